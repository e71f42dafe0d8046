"""Preference rows in TRL's forms become pairs; what is no preference is refused with field and row."""

import pytest

from dfactory.data.chat import ChatEncoder
from dfactory.data.fields import BadRow, Completion, Conversation, Fault, Pair, TokenIds
from dfactory.data.records import parse_row
from dfactory.errors import DataError


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "s"}
TOOL = {"name": "f"}

FORMS = {
    "texts": (
        {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
        Pair(Completion("2+2=", "4"), Completion("2+2=", "5")),
    ),
    "texts, implicit": (
        {"chosen": "Say hi: hello you", "rejected": "Say hi: help"},
        Pair(Completion("Say hi: hel", "lo you"), Completion("Say hi: hel", "p")),
    ),
    "texts, implicit, cut at a space": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        Pair(Completion("The sky is", " blue."), Completion("The sky is", " green.")),
    ),
    "messages": (
        {"prompt": [user("hi")], "chosen": [bot("yo")], "rejected": [bot("no")], "tools": [TOOL]},
        Pair(Conversation([user("hi"), bot("yo")], [TOOL], 1), Conversation([user("hi"), bot("no")], [TOOL], 1)),
    ),
    "messages, prompt repeated": (
        {"prompt": [user("hi")], "chosen": [user("hi"), bot("yo")], "rejected": [bot("no")]},
        Pair(Conversation([user("hi"), bot("yo")], None, 1), Conversation([user("hi"), bot("no")], None, 1)),
    ),
    "messages, implicit": (
        {"chosen": [user("a"), bot("b"), user("c"), bot("d")], "rejected": [user("a"), bot("b"), user("c"), bot("e")]},
        Pair(
            Conversation([user("a"), bot("b"), user("c"), bot("d")], None, 3),
            Conversation([user("a"), bot("b"), user("c"), bot("e")], None, 3),
        ),
    ),
    "text before conversations": (
        {"prompt": "hi", "chosen": [SYSTEM, user("hi"), bot("yo")], "rejected": [SYSTEM, user("hi"), bot("no")]},
        Pair(
            Conversation([SYSTEM, user("hi"), bot("yo")], None, 2),
            Conversation([SYSTEM, user("hi"), bot("no")], None, 2),
        ),
    ),
    "several turns": (
        {"chosen": [user("a"), bot("b"), user("c"), bot("d")], "rejected": [user("a"), bot("x"), user("c"), bot("y")]},
        Pair(
            Conversation([user("a"), bot("b"), user("c"), bot("d")], None, 1),
            Conversation([user("a"), bot("x"), user("c"), bot("y")], None, 1),
        ),
    ),
    "token ids": (
        {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]},
        Pair(TokenIds([5, 6, 7], 2), TokenIds([5, 6, 8, 9], 2)),
    ),
}

BAD = {
    "equal texts": ({"prompt": "a", "chosen": "b", "rejected": "b"}, Fault.EQUAL_SIDES, "chosen equals rejected"),
    "equal, implicit": ({"chosen": "a b", "rejected": "a b"}, Fault.EQUAL_SIDES, "chosen equals rejected"),
    "equal messages": (
        {"prompt": [user("a")], "chosen": [bot("b")], "rejected": [user("a"), bot("b")]},
        Fault.EQUAL_SIDES,
        "chosen equals rejected",
    ),
    "equal ids": ({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [2]}, Fault.EQUAL_SIDES, "chosen equals"),
    "empty chosen": ({"prompt": "a", "chosen": " ", "rejected": "b"}, Fault.EMPTY, "chosen is empty"),
    "empty rejected": ({"prompt": "a", "chosen": "b", "rejected": ""}, Fault.EMPTY, "rejected is empty"),
    "no messages": ({"prompt": [user("a")], "chosen": [], "rejected": [bot("b")]}, Fault.EMPTY, "chosen is empty"),
    "empty message": (
        {"prompt": [user("a")], "chosen": [bot("b")], "rejected": [bot("")]},
        Fault.EMPTY,
        "rejected[0].content is empty",
    ),
    "one is the beginning of the other": (
        {"chosen": "The sky", "rejected": "The sky is"},
        Fault.EMPTY,
        "chosen is empty after the prompt",
    ),
    "no answer behind the prompt": (
        {"chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("b"), bot("c")]},
        Fault.EMPTY,
        "chosen is empty after the prompt",
    ),
    "no assistant": (
        {"prompt": [user("a")], "chosen": [user("b")], "rejected": [bot("b")]},
        Fault.NO_ANSWER,
        "chosen has",
    ),
    "no common text": ({"chosen": "yes", "rejected": "no"}, Fault.TWO_PROMPTS, "no common beginning"),
    "no common message": (
        {"chosen": [user("a"), bot("b")], "rejected": [user("c"), bot("d")]},
        Fault.TWO_PROMPTS,
        "chosen[0] differs from rejected[0]",
    ),
    "last user turns differ": (
        {"chosen": [user("a"), bot("b"), user("c"), bot("d")], "rejected": [user("a"), bot("b"), user("x"), bot("d")]},
        Fault.TWO_PROMPTS,
        "from message 2 on chosen and rejected hold different user turns",
    ),
    "prompt repeated differently": (
        {"prompt": [user("a")], "chosen": [user("a"), bot("b")], "rejected": [user("A"), bot("c")]},
        Fault.TWO_PROMPTS,
        "rejected[0] differs from prompt[0]",
    ),
    "text is not the prompt": (
        {"prompt": "x", "chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("c")]},
        Fault.TWO_PROMPTS,
        "prompt is str 'x'",
    ),
    "text and messages": ({"prompt": "a", "chosen": "b", "rejected": [bot("c")]}, Fault.FIELD, "rejected is list"),
    "number": ({"prompt": 3, "chosen": "b", "rejected": "c"}, Fault.FIELD, "prompt is int 3: it must be text"),
    "rejected missing": ({"prompt": "a", "chosen": "b", "rejected": None}, Fault.FORMAT, "['chosen', 'prompt']"),
}


@pytest.mark.parametrize("row, expected", FORMS.values(), ids=FORMS)
def test_forms(row, expected):
    assert parse_row(row, prefer_pairs=True) == expected


@pytest.mark.parametrize("row, fault, text", BAD.values(), ids=BAD)
def test_no_preference(row, fault, text):
    bad = parse_row(row, prefer_pairs=True)
    assert isinstance(bad, BadRow), bad
    assert bad.fault == fault
    assert text in str(bad)


def test_a_row_of_both_kinds_is_read_as_the_stage_needs_it():
    row = {"messages": [user("a"), bot("b")], "chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("c")]}
    assert isinstance(parse_row(row), Conversation)
    assert isinstance(parse_row(row, prefer_pairs=True), Pair)


ROW = {"prompt": "hi", "chosen": "yo", "rejected": "nope"}
TURNS = {"prompt": [user("q")], "chosen": [bot("a")], "rejected": [bot("bc")]}


def test_sides_are_neighbours_of_one_name(load, write, show):
    examples = load(write(ROW, TURNS), paired=True)
    assert examples.unit_size == 2
    assert examples.document_id_E.tolist() == [1, 1, 2, 2]
    assert [show(e.input_ids_T, e.trainable_T) for e in examples] == [
        "hi[yo<|endoftext|>]",
        "hi[nope<|endoftext|>]",
        "<role>HUMAN</role>q<|role_end|><role>ASSISTANT</role>[a<|role_end|><|endoftext|>]",
        "<role>HUMAN</role>q<|role_end|><role>ASSISTANT</role>[bc<|role_end|><|endoftext|>]",
    ]
    assert "4 documents (2 pairs)" in str(examples.report)


def test_the_kind_of_record_has_to_fit_the_stage(load, write):
    single = {"prompt": "hi", "completion": "yo"}
    path = write(single, ROW)
    with pytest.raises(DataError, match=rf"{path}:2 holds a preference pair .* set stage: dpo"):
        load(path, on_bad_row="skip")
    path = write(ROW, single)
    with pytest.raises(DataError, match=rf"{path}:2 holds a single answer, .* set stage: sft"):
        load(path, paired=True, on_bad_row="skip")


def test_both_sides_are_kept_or_none(load, write):
    long = {"prompt": "hi", "chosen": "yo", "rejected": "x" * 40}
    path = write(ROW, long)
    with pytest.raises(DataError, match=rf"{path}:2: rejected: the document has 43 tokens"):
        load(path, paired=True)
    examples = load(path, paired=True, on_bad_row="skip")
    assert (len(examples), examples.report.num_refused) == (
        2,
        1,
    )  # one row in two: as many as max_bad_fraction 0.5 allows
    examples = load(path, paired=True, overlong="truncate")
    assert examples.length_E.tolist() == [5, 7, 5, 32]
    assert examples.report.truncated == 1


def test_a_cut_that_makes_sides_equal_is_refused(load, write):
    row = {"prompt": "hi", "chosen": "x" * 40, "rejected": "x" * 50}
    with pytest.raises(DataError, match=":1: chosen and rejected have the same tokens"):
        load(write(row), paired=True, overlong="truncate")


def test_a_template_that_parts_the_prompts_is_refused(load, write, tokenizer):
    template = (
        "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- 'long' if m.content | length > 1 else 'short' }}"
    )
    template += (
        "{%- generation %}{{- m.content ~ eos_token }}{%- endgeneration %}{%- else %}{{- m.content }}{%- endif %}"
    )
    template += "{%- endfor %}"
    with pytest.raises(DataError, match=":1: the prompts of chosen and rejected come out as different tokens"):
        load(write(TURNS), paired=True, encoder=ChatEncoder(tokenizer, template))
