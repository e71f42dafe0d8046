"""What rename_columns, tool_calls and reasoning make of a row, in every place where rows are read."""

import dataclasses
import json

import pytest

from dfactory.config.data import DatasetKeys
from dfactory.data import rewriting
from dfactory.data.chat import ChatEncoder
from dfactory.data.entries import entry_of
from dfactory.data.examples import DocumentRules
from dfactory.data.fields import BadRow, Fault
from dfactory.data.named_templates import read_chat_template
from dfactory.data.prompts import rows_of
from dfactory.data.records import read_records
from dfactory.data.rewriting import rewriter
from dfactory.data.streaming import StreamedExamples
from dfactory.errors import ConfigError
from dfactory.recipe import load_recipe
from tests.data.conftest import EOS, MASK

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"properties": {"days": {"type": "integer"}}}},
}
HERMES = f"""You are a function calling AI model. You are provided with function signatures within <tools> </tools> XML \
tags. You may call one or more functions to assist with the user query. Don't make assumptions about what values to plug \
into functions.
<tools>
[{WEATHER}]
</tools>
For each function call return a json object with function name and arguments within <tool_call> </tool_call> tags with the \
following schema:
<tool_call>
{{'arguments': <args-dict>, 'name': <function-name>}}
</tool_call>"""
QWEN = f"""Be brief.

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{json.dumps(WEATHER)}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
OSLO = {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}
CALLS = [{"type": "function", "function": OSLO}]
SPELT = {
    "Hermes, JSON": '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>',
    "Hermes, Python": "<tool_call>\n{'arguments': {'city': 'Oslo', 'days': 2}, 'name': 'weather'}\n</tool_call>",
    "Qwen 3 Coder": "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n2\n"
    "</parameter>\n</function>\n</tool_call>",
}


def said(role, content, **further):
    return {"role": role, "content": content, **further}


def rewritten(row, **keys):
    return rewriter(DatasetKeys("rows.jsonl", **keys))(row)


def parsed(*turns, **further):
    return rewritten({"messages": [*turns, said("assistant", "ok")], **further}, tool_calls="parse")


# --- names of columns -------------------------------------------------------------------------------------------------


def test_columns_get_the_names_that_the_readers_know(write):
    entry = DatasetKeys(
        write({"q": "1 + 1?", "reply": "2", "n": 3}), rename_columns={"q": "question", "reply": "response"}
    )
    (_, record), (_, fields) = next(read_records(entry)), next(rows_of(entry))
    assert [message["content"] for message in record.messages] == ["1 + 1?", "2"]
    assert fields == {"question": "1 + 1?", "response": "2", "n": 3}


def test_a_name_that_is_taken_is_refused_but_names_may_be_exchanged():
    row = {"a": "x", "b": "y", "c": None}
    assert rewritten(row, rename_columns={"a": "b", "b": "a"}) == {"a": "y", "b": "x", "c": None}
    assert rewritten(row, rename_columns={"a": "c"}) == {"b": "y", "c": "x"}
    bad = rewritten(row, rename_columns={"a": "b"})
    assert isinstance(bad, BadRow)
    assert "rename_columns makes b of a, but the row has b" in str(bad)


# --- calls of tools ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", SPELT)
def test_calls_that_an_answer_spells_become_calls(form):
    """The number is one in each form: JSON says so, and so does the schema of the tool."""
    row = parsed(said("user", "w?"), said("assistant", f"Let me see.\n{SPELT[form]}"), tools=[WEATHER])
    assert row["messages"][1] == said("assistant", "Let me see.", tool_calls=CALLS)


def test_several_calls_and_what_they_gave():
    both = f"{SPELT['Hermes, JSON']}\n{SPELT['Hermes, Python']}"
    given = "<tool_response>\nrain\n</tool_response>\n<tool_response>\nsun\n</tool_response>"
    for speaker in ("user", "tool"):  # Qwen's templates write results as the user's
        row = parsed(said("user", "w?"), said("assistant", both), said(speaker, given))
        assert row["messages"][1:-1] == [
            said("assistant", "", tool_calls=CALLS * 2),
            said("tool", "rain"),
            said("tool", "sun"),
        ]


@pytest.mark.parametrize(("system", "left"), [(HERMES, []), (QWEN, [said("system", "Be brief.")])])
def test_tools_that_a_system_message_announces_become_the_column(system, left):
    row = parsed(said("system", system), said("user", "w?"))
    assert row["tools"] == [WEATHER]
    assert row["messages"] == [*left, said("user", "w?"), said("assistant", "ok")]
    assert parsed(said("system", system), said("user", "w?"), tools=json.dumps([WEATHER])) == row
    other = parsed(said("system", system), said("user", "w?"), tools=[{"name": "f"}])
    assert "other tools than the column tools" in str(other)


def test_sharegpts_turns_too(write):
    turns = [("system", HERMES), ("human", "w?"), ("gpt", SPELT["Hermes, Python"])]
    turns += [("tool", "<tool_response>\nrain\n</tool_response>"), ("gpt", "It rains.")]
    path = write({"conversations": [{"from": speaker, "value": text} for speaker, text in turns]})
    ((_, record),) = read_records(DatasetKeys(path, tool_calls="parse"))
    assert [message["role"] for message in record.messages] == ["user", "assistant", "tool", "assistant"]
    assert (record.messages[1]["tool_calls"], record.messages[2]["content"]) == (CALLS, "rain")
    ((_, as_text),) = read_records(path)
    assert as_text.messages[2]["content"] == SPELT["Hermes, Python"]


@pytest.mark.parametrize(
    ("turn", "told"),
    [
        (said("assistant", "<tool_call>{}"), "has <tool_call> without </tool_call>"),
        (said("assistant", "<tool_call>weather</tool_call>"), "neither JSON nor a Python literal"),
        (said("assistant", "<tool_call>[1]</tool_call>"), "no list of objects"),
        (said("assistant", '<tool_call>{"arguments": {}}</tool_call>'), "must have `name` and `arguments`"),
        (said("assistant", f"{SPELT['Hermes, JSON']} there"), "after a call"),
        (said("assistant", SPELT["Hermes, JSON"], tool_calls=CALLS), "keep one of them"),
        (said("user", "so: <tool_response>rain</tool_response>"), "text beside <tool_response>"),
        (said("system", "Use <tools>f</tools>."), "in other words than Hermes's or Qwen's"),
        (said("assistant", "<tool_call>" + "[" * 5000 + "</tool_call>"), "neither JSON nor a Python literal"),
    ],
)
def test_what_is_no_call_is_refused_by_name(turn, told):
    bad = parsed(said("user", "w?"), turn)
    assert isinstance(bad, BadRow), bad
    assert told in str(bad)
    assert "messages[1].content" in str(bad)


# --- reasoning --------------------------------------------------------------------------------------------------------

THOUGHT = "<think>\nOne and one.\n</think>\n\nTwo."
FORMS = {
    "keep": None,
    "tags": said("assistant", THOUGHT),
    "field": said("assistant", "Two.", reasoning_content="One and one."),
    "strip": said("assistant", "Two."),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "turn",
    [
        said("assistant", THOUGHT),
        said("assistant", "Two.", reasoning_content="One and one."),
        said("assistant", "Two.", thinking=" One and one.\n"),
        said("assistant", "One and one.\n</think>\n\nTwo."),  # the template wrote the opening tag
        said("assistant", [{"type": "text", "text": "<thinking>One and one.</thinking>Two."}]),
    ],
)
def test_reasoning_takes_the_form_that_the_key_says(turn, form):
    row = rewritten({"messages": [said("user", "1 + 1?"), turn]}, reasoning=form)
    assert row["messages"] == [said("user", "1 + 1?"), FORMS[form] or turn]


def test_reasoning_of_plain_answers_is_stripped_and_what_has_no_end_is_refused():
    row = {"prompt": "1 + 1?", "chosen": THOUGHT, "rejected": "Three."}
    assert rewritten(row, reasoning="strip") == row | {"chosen": "Two."}
    for text in ("<think> on and on", THOUGHT.partition("\n\n")[0]):
        bad = rewritten(row | {"chosen": text}, reasoning="strip")
        assert isinstance(bad, BadRow), text
        assert "chosen" in str(bad)
    within = said("assistant", "Tags: <think>x</think>")
    assert rewritten({"messages": [within]}, reasoning="strip")["messages"] == [within]
    twice = rewritten({"messages": [said("assistant", THOUGHT, reasoning="One.")]}, reasoning="tags")
    assert "keep one" in str(twice)


def test_reasoning_and_calls_in_one_answer():
    turn = said("assistant", f"<think>w</think>{SPELT['Hermes, JSON']}")
    row = rewritten({"messages": [turn]}, reasoning="field", tool_calls="parse")
    assert row["messages"] == [said("assistant", "", reasoning_content="w", tool_calls=CALLS)]


def test_chatml_writes_what_was_parsed(tokenizer, show):
    """Read from Qwen's text, and written as Qwen's template writes it."""
    turns = [
        said("system", QWEN),
        said("user", "w?"),
        said("assistant", f"<think>\nw\n</think>\n\n{SPELT['Hermes, JSON']}"),
    ]
    turns += [said("user", "<tool_response>\nrain\n</tool_response>"), said("assistant", "It rains.")]
    row = rewritten({"messages": turns}, reasoning="field", tool_calls="parse")
    encoder = ChatEncoder(tokenizer, read_chat_template("chatml"))
    shown = show(*encoder.encode_messages(row["messages"], row["tools"]))
    expected = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    assert shown.replace("[", "").replace("]", "") == expected.replace("[", "").replace("]", "")
    assert shown.endswith("<|im_start|>assistant\n[It rains.<|im_end|>\n]")  # a tokenizer without <|im_end|>


def test_streamed_records_are_rewritten_and_their_keys_are_part_of_the_fingerprint(write, tokenizer, load):
    path = write({"q": "hi", "reply": "yo"}, {"q": "a", "reply": "b"})
    entry = DatasetKeys(path, rename_columns={"q": "question", "reply": "response"})
    options = {"on_bad_row": "error", "max_bad_fraction": 0.0, "block_size": 4, "paired": False}

    def streamed(entry):
        rules = DocumentRules(64, "refuse", EOS, len(tokenizer), MASK)
        return StreamedExamples([entry], ChatEncoder(tokenizer), rules, **options)

    examples = streamed(entry)
    (example,) = examples.unit(0)
    assert "hi" in tokenizer.decode(example.input_ids_T)
    other = streamed(dataclasses.replace(entry, reasoning="strip"))
    assert examples.fingerprint != other.fingerprint


# --- other forms that are refused or read -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "named"), [("image_url", "an image"), ("input_audio", "a sound"), ("video", "a video")]
)
def test_parts_of_another_modality_are_refused_by_name(kind, named, write):
    parts = [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {"url": "x"}}]
    ((_, bad),) = read_records(write({"messages": [said("user", parts), said("assistant", "A cat.")]}))
    assert (bad.fault, f"messages[0].content[1] is {named} ({kind})" in str(bad)) == (Fault.FIELD, True)


def test_a_judges_pairs_and_ties(write):
    sides = {"response_a": "yes", "response_b": "no"}
    arena = {f"conversation_{side}": [said("user", "q?"), said("assistant", side)] for side in "ab"}
    rows = [{"prompt": "q?", **sides, "winner": winner} for winner in ("a", "model_b", "tie", "both!")]
    rows += [{**arena, "winner": "model_b"}, {**arena, "winner": "tie (bothbad)"}]
    rows += [
        {"prompt": "q?", "chosen": "yes", "rejected": "no", **tie} for tie in ({"winner": "tie"}, {"is_tie": True})
    ]
    first, second, tie, unknown, talk, *ties = (record for _, record in read_records(write(*rows)))
    assert (first.chosen.completion, first.rejected.completion) == ("yes", "no")
    assert (second.chosen.completion, second.rejected.completion) == ("no", "yes")
    assert talk.chosen.messages[-1]["content"] == "b"
    assert [bad.fault for bad in (tie, *ties)] == [Fault.TIE] * 4
    assert "winner is str 'tie': neither side is preferred, and no stage trains on ties" in str(tie)
    assert "it must be a, b (or model_a, model_b) or tie" in str(unknown)


# --- names ------------------------------------------------------------------------------------------------------------


def test_words_that_name_datasets_of_the_hub(tmp_path, monkeypatch):
    assert entry_of("org/set") == DatasetKeys(name="org/set")
    at = entry_of("org/set@v1.0[main/test[:200]]")
    assert at == DatasetKeys(name="org/set", revision="v1.0", config="main", split="test[:200]")
    assert entry_of("org/set@refs/pr/1").revision == "refs/pr/1"
    for path in ("data/train.jsonl", "a/b/c", "rows.csv", "/tmp/x", "rows"):
        assert entry_of(path) == DatasetKeys(path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/set").mkdir(parents=True)
    assert entry_of("org/set") == DatasetKeys("org/set")


def test_templates_by_name_and_of_a_model(tmp_path):
    assert "<|im_start|>" in read_chat_template("chatml")
    (tmp_path / "chat_template.jinja").write_text("A")
    assert read_chat_template(str(tmp_path)) == "A"
    (tmp_path / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert read_chat_template(str(tmp_path)) == "D"
    with pytest.raises(ConfigError, match=r"chatm does not exist \(did you mean chatml"):
        read_chat_template("chatm")


def test_a_recipe_tells_names_of_templates_from_files_and_refuses_equal_names_of_columns(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    keys = {"model_name_or_path": "tiny", "block_size": 8, "max_length": 32, "max_steps": 1, "output_dir": "out"}
    for word, meant in (("chatml", "chatml"), ("org/name@v1", "org/name@v1"), ("x.jinja", str(tmp_path / "x.jinja"))):
        recipe.write_text(json.dumps(keys | {"datasets": [{"path": "a.jsonl"}], "chat_template_path": word}))
        assert load_recipe(recipe, []).chat_template_path == meant
    with pytest.raises(ConfigError, match=r"datasets\.rename_columns .*: give every column a name of its own"):
        load_recipe(recipe, ["datasets=[{path: a.jsonl, rename_columns: {a: text, b: text}}]"])


def test_trls_templates_have_names():
    pytest.importorskip("trl")
    assert "generation" in read_chat_template("qwen3_training")


# --- system message, and which answers are trained ---------------------------------------------------------------------


def test_a_system_prompt_takes_the_place_of_each_records_own():
    turns = [said("system", "old"), said("user", "q"), said("assistant", "a")]
    new = {"messages": turns[1:], "system": "new"}
    assert rewritten({"messages": turns}, system_prompt="new") == new
    assert rewritten({"messages": turns[1:], "system_prompt": "old"}, system_prompt="new") == new
    assert rewritten({"messages": turns}, system_prompt="") == {"messages": turns[1:]}
    assert rewritten({"instruction": "q", "output": "a", "system": "old"}, system_prompt="new")["system"] == "new"
    shared = [{"from": "system", "value": "old"}, {"from": "human", "value": "q"}]
    assert rewritten({"conversations": shared}, system_prompt="")["conversations"] == shared[1:]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [said("user", "1"), said("assistant", "one"), said("user", "2"), said("assistant", "two")]},
        {
            "conversations": [
                {"from": who, "value": text}
                for who, text in (("human", "1"), ("gpt", "one"), ("human", "2"), ("gpt", "two"))
            ]
        },
    ],
)
def test_only_the_last_answer_is_trained(write, tokenizer, row):
    def trained(**keys):
        (_, record), *_ = read_records(DatasetKeys(write(row), **keys))
        ids, trainable = ChatEncoder(tokenizer, read_chat_template("chatml")).encode_records([record])[0]
        return tokenizer.decode(ids[trainable])

    assert "one" in trained()
    assert "one" not in trained(trained_turns="last", system_prompt="Be brief.")
    assert "two" in trained(trained_turns="last")


def test_they_change_the_checksum_of_streamed_records():
    assert rewriting.changes_of(DatasetKeys("a", system_prompt="x")) == "system_prompt=x;"
    assert rewriting.changes_of(DatasetKeys("a", trained_turns="last")) == "trained_turns=last;"
