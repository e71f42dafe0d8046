"""What stands beside the turns of a record is read, refused by name, or reported: it never vanishes."""

import pytest

from dfactory.data.chat import ChatEncoder
from dfactory.data.fields import BadRow, Completion, Conversation, Fault, Pair, TokenIds
from dfactory.data.records import parse_row


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def bot(text, **further):
    return {"role": "assistant", "content": text, **further}


TURNS = [user("hi"), bot("yo")]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
BRIEF = system("Be brief.")
SIDES = {"chosen": "The capital is Paris.", "rejected": "The capital is Rome."}
LISTS = {"chosen": [user("hi"), bot("yo")], "rejected": [user("hi"), bot("no")]}
TOOLS = [{"name": "f"}]


def pair(context, tools=None):
    sides = (bot("The capital is Paris."), bot("The capital is Rome."))
    return Pair(*(Conversation([*context, side], tools, len(context)) for side in sides))


READ = {
    "dolly": (
        {"instruction": "When?", "context": "In 2000.", "response": "2000", "category": "qa"},
        Conversation([user("When?\nIn 2000."), bot("2000")]),
    ),
    "context beside output": (
        {"instruction": "When?", "context": "In 2000.", "output": "2000"},
        Conversation([user("When?\nIn 2000."), bot("2000")]),
    ),
    "input beside response": (
        {"instruction": "Add.", "input": "1 2", "response": "3"},
        Conversation([user("Add.\n1 2"), bot("3")]),
    ),
    "alpaca's system and history": (
        {"instruction": "c", "output": "d", "system": "Be brief.", "history": [["a", "b"]]},
        Conversation([BRIEF, user("a"), bot("b"), user("c"), bot("d")]),
    ),
    "system and history beside response": (
        {"instruction": "c", "response": "d", "system": "Be brief.", "history": [["a", "b"]], "input": ""},
        Conversation([BRIEF, user("a"), bot("b"), user("c"), bot("d")]),
    ),
    "sharegpt's system": ({"conversations": SHAREGPT, "system": "Be brief."}, Conversation([BRIEF, *TURNS])),
    "conversations of messages": ({"conversations": TURNS}, Conversation(TURNS)),
    "system beside messages": ({"messages": TURNS, "system": "Be brief."}, Conversation([BRIEF, *TURNS])),
    "the same system twice": ({"messages": [BRIEF, *TURNS], "system": "Be brief. "}, Conversation([BRIEF, *TURNS])),
    "an empty system": ({"messages": TURNS, "system": " "}, Conversation(TURNS)),
    "system_prompt": (
        {"system_prompt": "Be brief.", "question": "hi", "response": "yo"},
        Conversation([BRIEF, *TURNS]),
    ),
    "system beside a conversational completion": (
        {"system": "Be brief.", "prompt": [user("hi")], "completion": [bot("yo")]},
        Conversation([BRIEF, *TURNS], None, 2),
    ),
    "orca": ({"system": "Be brief.", "question": "Capital?", **SIDES}, pair([BRIEF, user("Capital?")])),
    "question beside sides": ({"question": "Capital?", **SIDES}, pair([user("Capital?")])),
    "alpaca's preferences": (
        {"instruction": "Capital?", "input": "Of France.", **SIDES},
        pair([user("Capital?\nOf France.")]),
    ),
    "sharegpt's preferences": (
        {
            "conversations": [{"from": "human", "value": "Capital?"}],
            "chosen": {"from": "gpt", "value": SIDES["chosen"]},
            "rejected": {"from": "gpt", "value": SIDES["rejected"]},
        },
        pair([user("Capital?")]),
    ),
    "system beside conversational sides": (
        {"system": "Be brief.", **LISTS},
        Pair(Conversation([BRIEF, user("hi"), bot("yo")], None, 2), Conversation([BRIEF, user("hi"), bot("no")], None, 2)),
    ),
    "what the prompt holds already": (
        {"prompt": "In 2000.\nWhen?", "context": "In  2000.", "completion": "2000"},
        Completion("In 2000.\nWhen?", "2000"),
    ),
    "label true": ({"prompt": "hi", "completion": "yo", "label": True}, Completion("hi", "yo")),
    "label of another task": ({"text": "hi yo", "label": 0}, Completion("", "hi yo")),
    "tools beside an instruction": (
        {"instruction": "hi", "response": "yo", "tools": TOOLS},
        Conversation(TURNS, TOOLS),
    ),
    "labels that say the same": (
        {"input_ids": [5, 6, 7], "prompt_lengths": 1, "labels": [-100, 6, 7], "attention_mask": [1, 1, 1]},
        TokenIds([5, 6, 7], 1),
    ),
    "an answer column": ({"prompt": [user("hi")], "answer": "yo"}, Conversation(TURNS, None, 1)),
    "an answer beside text": ({"prompt": "2+2=", "answer": 4}, Completion("2+2=", "4")),
    "an answer behind messages": ({"messages": [user("hi")], "answer": "yo"}, Conversation(TURNS)),
    "question and answer": ({"question": "hi", "answer": "yo"}, Conversation(TURNS)),
}  # fmt: skip

REFUSED = {
    "two system prompts": ({"messages": [system("a"), *TURNS], "system": "b"}, "system is str 'b', but the first message"),
    "system beside text": ({"system": "Be brief.", "prompt": "hi", "completion": "yo"}, "`system`"),
    "context beside text": ({"context": "In 2000.", "prompt": "When?", "completion": "2000"}, "`context`"),
    "context beside messages": ({"context": "In 2000.", "messages": TURNS}, "`context`"),
    "tools beside text": ({"tools": TOOLS, "prompt": "hi", "completion": "yo"}, "`tools`"),
    "both input and context": ({"instruction": "a", "input": "b", "context": "c", "output": "d"}, "input and context"),
    "query beside sides": ({"query": "Capital?", **SIDES}, "`query`"),
    "system beside sides": ({"system": "Be brief.", **SIDES}, "`system`"),
    "system beside a text pair": ({"system": "Be brief.", "prompt": "Capital?", **SIDES}, "`system`"),
    "history of another form": ({"instruction": "a", "output": "b", "history": "x"}, "history is str 'x'"),
    "images": ({"messages": TURNS, "images": ["a.png"]}, "`images`"),
    "an image": ({"conversations": SHAREGPT, "image": "a.png"}, "`image`"),
    "images of a turn": ({"messages": [{**TURNS[0], "images": ["a.png"]}, TURNS[1]]}, "messages[0].images"),
    "functions": ({"messages": TURNS, "functions": TOOLS}, "`functions`"),
    "options of the template": ({"messages": TURNS, "chat_template_kwargs": {"x": 1}}, "`chat_template_kwargs`"),
    "label false": ({"prompt": "hi", "completion": "yo", "label": False}, "label is false"),
    "label 0": ({"prompt": [user("hi")], "completion": [bot("yo")], "label": 0}, "label is false"),
    "kto_tag": ({"conversations": SHAREGPT, "kto_tag": False}, "kto_tag is false"),
    "weight of another kind": ({"messages": [user("hi"), bot("yo", weight=0.5)]}, "messages[1].weight is float 0.5"),
    "nothing is to be trained": ({"messages": [user("hi"), bot("yo", weight=0)]}, "no assistant turn"),
    "other labels": ({"input_ids": [5, 6], "prompt_lengths": 1, "labels": [5, 6]}, "labels[0] is int 5"),
    "padding": ({"input_ids": [5, 0], "prompt_lengths": 1, "attention_mask": [1, 0]}, "attention_mask[1] is int 0"),
}  # fmt: skip


@pytest.mark.parametrize("row, expected", READ.values(), ids=READ)
def test_what_a_column_plainly_means_is_read(row, expected):
    record = parse_row(row, prefer_pairs="chosen" in row)
    assert record == expected
    assert type(record) is type(expected)


@pytest.mark.parametrize("row, message", REFUSED.values(), ids=REFUSED)
def test_what_would_vanish_is_refused_by_name(row, message):
    bad = parse_row(row)
    assert isinstance(bad, BadRow), bad
    assert message in str(bad)


def test_traces_keep_the_columns_of_their_question():
    trace = {"prompt_ids": [5], "token_ids": [7, 8, 9], "commit_step": [0, 1, 2], "block_size": 4}
    assert isinstance(parse_row({**trace, "system": "x", "context": "y", "messages": TURNS[:1]}), TokenIds)


# --- turns that are not trained, and texts that the template leaves out ----------------------------------------------


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": False}]
)
def test_a_turn_of_weight_0_is_context(mark, tokenizer, chat_template, show):
    messages = [user("a"), bot("b", **mark), user("c"), bot("d", weight=1)]
    record = parse_row({"messages": messages})
    shown = show(*ChatEncoder(tokenizer, chat_template).encode_records([record])[0])
    assert shown == (
        "<role>HUMAN</role>a<|role_end|><role>ASSISTANT</role>b<|role_end|>"
        "<role>HUMAN</role>c<|role_end|><role>ASSISTANT</role>[d<|role_end|>]"
    )


NO_SYSTEM = """{%- for m in messages %}{%- if m.role == 'user' %}<role>HUMAN</role>{{ m.content }}<|role_end|>
{%- elif m.role == 'assistant' %}<role>ASSISTANT</role>{% generation %}{{ m.content }}<|role_end|>{% endgeneration %}
{%- endif %}{%- endfor %}{%- if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"""


@pytest.mark.parametrize("text", ["Be brief.", "s", "hi", "HUMAN", "Answer at length, with every step of the proof."])
@pytest.mark.parametrize("marked", [True, False])
def test_a_system_message_that_the_template_has_no_branch_for(text, marked, tokenizer):
    template = NO_SYSTEM if marked else NO_SYSTEM.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    encoder = ChatEncoder(tokenizer, template)
    bad = encoder.encode_records([Conversation([system(text), *TURNS])])[0]
    assert isinstance(bad, BadRow)
    assert bad.fault is Fault.TEMPLATE
    assert "messages[0].content (of system) is not in what the chat template writes" in str(bad)
    with pytest.raises(BadRow, match=r"messages\[0\].content"):
        encoder.encode_prompt([system(text), user("hi")])
    assert not isinstance(encoder.encode_records([Conversation([system(" "), *TURNS])])[0], BadRow)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking", "refusal"])
@pytest.mark.parametrize("text", ["One and one.", "1"])
def test_reasoning_that_the_template_leaves_out(field, text, tokenizer, chat_template):
    record = parse_row({"messages": [user("hi"), bot("yo", **{field: text})]})
    bad = ChatEncoder(tokenizer, chat_template).encode_records([record])[0]
    assert isinstance(bad, BadRow)
    assert f"messages[1].{field}" in str(bad)


def test_reasoning_that_the_template_writes(tokenizer, show):
    template = NO_SYSTEM.replace(
        "{{ m.content }}<|role_end|>{% endgen",
        "<think>{{ m.reasoning_content }}</think>{{ m.content }}<|role_end|>{% endgen",
    )
    record = parse_row({"messages": [user("hi"), bot("yo", reasoning="1")]})
    shown = show(*ChatEncoder(tokenizer, template).encode_records([record])[0])
    assert shown == "<role>HUMAN</role>hi<|role_end|><role>ASSISTANT</role>[<think>1</think>yo<|role_end|>]"


@pytest.mark.parametrize(
    "written", ["m.content | trim", "m.content | tojson", "m.content.split('|') | join('\n')", "m.content ~ '!'"]
)
def test_a_text_that_the_template_writes_in_another_form_is_there(written, tokenizer):
    text = ' He said "a\n| longer text than short ones".\n'
    template = NO_SYSTEM.replace("<role>HUMAN</role>{{ m.content }}", f"<role>HUMAN</role>{{{{ {written} }}}}")
    if "split" in written:
        text = text.replace("|", "")
    encoder = ChatEncoder(tokenizer, template)
    assert not isinstance(encoder.encode_records([Conversation([user(text), bot("yo")])])[0], BadRow)


def test_a_template_that_shows_the_last_question_alone(tokenizer):
    template = (
        "{{ messages[-2].content }}<role>{% generation %}{{ messages[-1].content }}<|role_end|>{% endgeneration %}"
    )
    encoder = ChatEncoder(tokenizer, template)
    assert not isinstance(encoder.encode_records([Conversation(TURNS)])[0], BadRow)
    assert isinstance(encoder.encode_records([Conversation([user("a"), bot("b"), *TURNS])])[0], BadRow)


# --- the report -------------------------------------------------------------------------------------------------------


def test_other_text_columns_are_reported_once_with_their_share(write, load):
    rows = [{"prompt": "hi", "completion": "yo", "note": "x"}, {"prompt": "hi", "completion": "yo", "note": ""}]
    rows += [{"prompt": "hi", "completion": "yo", "id": 3}, {"messages": [{**user("hi"), "language": "de"}, bot("yo")]}]
    examples = load(write(*rows))
    told = [line for line in str(examples.report).splitlines() if "nobody reads" in line]
    assert told == ["text that nobody reads: messages[].language in 25.0% of the rows, note in 25.0%"]
    assert "nobody reads" not in str(load(write(rows[2], name="b.jsonl")).report)
