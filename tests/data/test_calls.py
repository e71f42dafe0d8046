"""Conversations with tools as they are exported: empty and null calls, arguments in every form, what Arrow puts in."""

import datetime
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dfactory.data.chat import ChatEncoder
from dfactory.data.fields import BadRow, Fault
from dfactory.data.records import parse_row, read_records

ASKED = {"role": "user", "content": "hi"}
ANSWERED = {"role": "assistant", "content": "yo"}
WRITES_CALLS = """{%- for m in messages %}<role>{{ m.role }}</role>
{%- if m.role == 'assistant' %}{% generation %}
{%- if m.tool_calls is defined %}[TOOL_CALLS] {{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}<|role_end|>
{%- endgeneration %}{% else %}{{ m.content }}<|role_end|>{% endif %}{% endfor %}"""


def calls_of(message):
    record = parse_row({"messages": [ASKED, message, {"role": "tool", "content": "1"}, ANSWERED]})
    assert not isinstance(record, BadRow), record
    return record.messages[1]["tool_calls"]


def called(function, **further):
    return {"role": "assistant", "content": None, "tool_calls": [function], **further}


@pytest.mark.parametrize("empty", [[], None])
def test_an_answer_without_calls_is_text(empty, tokenizer, show):
    """`tool_calls: []` is what exporters write where there are none; templates ask whether the key is there."""
    record = parse_row({"messages": [{**ASKED, "tool_calls": empty}, {**ANSWERED, "tool_calls": empty}]})
    assert record.messages == [ASKED, ANSWERED]
    shown = show(*ChatEncoder(tokenizer, WRITES_CALLS).encode_records([record])[0])
    assert shown == "<role>user</role>hi<|role_end|><role>assistant</role>[yo<|role_end|>]"


def test_neither_text_nor_calls_is_an_empty_turn():
    bad = parse_row({"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": []}]})
    assert bad.fault in (Fault.EMPTY, Fault.FIELD)
    assert "messages[1].content" in str(bad)


@pytest.mark.parametrize("arguments", ["", " \n", None, "{}", {}, "null"])
@pytest.mark.parametrize("nested", [True, False])
def test_no_arguments_are_an_empty_object(arguments, nested):
    function = {"name": "f", "arguments": arguments}
    (call,) = calls_of(called({"type": "function", "function": function} if nested else function))
    assert (call["function"] if nested else call) == {"name": "f", "arguments": {}}


def test_a_call_that_names_no_arguments_has_none():
    assert calls_of(called({"function": {"name": "f"}})) == [{"function": {"name": "f", "arguments": {}}}]


def test_arguments_as_text_are_read_wherever_they_stand():
    assert calls_of(called({"name": "f", "arguments": '{"a": 1}'})) == [{"name": "f", "arguments": {"a": 1}}]
    bad = parse_row({"messages": [ASKED, called({"name": "f", "arguments": "a=1"})]})
    assert "messages[1].tool_calls[0].arguments is text but not valid JSON" in str(bad)


def test_nulls_that_arrow_puts_into_structs_are_not_there(tmp_path):
    """Columns of one type: every row has the keys of all of them."""
    calls = [{"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "add", "arguments": {"expr": "1+1"}}]
    schemas = [
        {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}, "required": ["city"]}},
        {"name": "add", "parameters": {"properties": {"expr": {"type": "string", "enum": ["1+1", None]}}}},
    ]
    rows = [
        {
            "messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [{"function": call}]}],
            "tools": [tool],
        }
        for call, tool in zip(calls, schemas, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    records = [record for _, record in read_records(tmp_path / "rows.parquet")]
    assert [record.messages[1]["tool_calls"][0]["function"] for record in records] == calls
    assert [record.tools for record in records] == [[schema] for schema in schemas]


def test_nulls_of_exported_json_are_not_there_but_those_of_arguments_as_text_are():
    (call,) = calls_of(called({"function": {"name": "f", "arguments": {"city": "Oslo", "expr": None, "of": [None]}}}))
    assert call["function"]["arguments"] == {"city": "Oslo", "of": [None]}
    (call,) = calls_of(called({"function": {"name": "f", "arguments": '{"city": "Oslo", "expr": null}'}}))
    assert call["function"]["arguments"] == {"city": "Oslo", "expr": None}


def test_values_of_arrow_that_are_not_json():
    (call,) = calls_of(called({"function": {"name": "f", "arguments": {"day": datetime.date(2024, 1, 2)}}}))
    assert call["function"]["arguments"] == {"day": "2024-01-02"}
    for value, said in ((float("nan"), "NaN"), (b"\xff", "bytes")):
        bad = parse_row({"messages": [ASKED, called({"function": {"name": "f", "arguments": {"x": value}}})]})
        assert said in str(bad)


@pytest.mark.parametrize("tools", ["", "[]", "null", [], None, " "])
def test_no_tools(tools):
    assert parse_row({"messages": [ASKED, ANSWERED], "tools": tools}).tools is None


def test_a_tool_as_text_keeps_its_nulls():
    tools = [{"name": "f", "parameters": {"properties": {"a": {"default": None}}}}]
    assert parse_row({"messages": [ASKED, ANSWERED], "tools": json.dumps(tools)}).tools == tools


def test_the_earlier_form_of_a_call():
    """OpenAI's function_call, and role function for what came back."""
    call = {"name": "f", "arguments": '{"a": 1}'}
    rows = [ASKED, {"role": "assistant", "content": None, "function_call": call}]
    record = parse_row({"messages": [*rows, {"role": "function", "name": "f", "content": "1"}, ANSWERED]})
    expected = [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
    assert record.messages[1]["tool_calls"] == expected
    assert "function_call" not in record.messages[1]
    assert record.messages[2] == {"role": "tool", "name": "f", "content": "1"}


def test_sharegpts_calls_are_turns_of_their_own_speakers():
    turns = [("human", "w?"), ("function_call", '{"name": "f", "arguments": {"a": 1}}'), ("observation", "2")]
    row = {"conversations": [{"from": name, "value": text} for name, text in [*turns, ("gpt", "two")]]}
    record = parse_row({**row, "tools": '[{"name": "f"}]'})
    assert [message["role"] for message in record.messages] == ["user", "assistant", "tool", "assistant"]
    assert record.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert record.tools == [{"name": "f"}]


def test_calls_that_the_template_leaves_out_are_refused(tokenizer):
    """It writes the names of calls, and not their arguments."""
    template = WRITES_CALLS.replace("m.tool_calls | tojson", "m.tool_calls[0].function.name")
    arguments = {"city": "Reykjavik, the northern one"}
    row = {"messages": [ASKED, called({"function": {"name": "weather", "arguments": arguments}})]}
    bad = ChatEncoder(tokenizer, template).encode_records([parse_row(row)])[0]
    assert bad.fault is Fault.TEMPLATE
    assert "messages[1].tool_calls" in str(bad)
    ChatEncoder(tokenizer, WRITES_CALLS).encode_messages(parse_row(row).messages)
