"""Preference rows -> Pair: two answers to one prompt, in TRL's forms.

    prompt + chosen + rejected               texts, or lists of messages; the sides may repeat the prompt's messages
    question (or instruction) + the same     a conversation of one question, with system, input, context, history
    conversations + chosen + rejected        ShareGPT's turns, and an answer as a turn, messages or text
    chosen + rejected                        whole texts or conversations; the prompt is their common beginning, unless
                                             another column states it
    conversation_a + conversation_b + winner    whole conversations, of which a judge preferred one (the chatbot arena)
    prompt + response_a + response_b + winner   two answers to one prompt, the same
    prompt_ids + chosen_ids + rejected_ids   tokenised

Refused are equal sides, an empty side, sides that answer different prompts, and ties: no stage trains on them.
"""

from collections.abc import Callable, Sequence
from typing import Any

from dfactory.data import columns, fields
from dfactory.data.columns import ASKED, SYSTEM, Format, asked, said, sharegpt_messages, with_system
from dfactory.data.fields import BadRow, Completion, Conversation, Fault, Pair, TokenIds, check_messages

SIDES = ("chosen", "rejected")
TIES = (
    "tie",
    "tie (bothbad)",
    "tie (both bad)",
    "both",
    "bothbad",
    "both_bad",
    "neither",
    "draw",
    "equal",
    "same",
    "c",
)
WINNERS = {
    **dict.fromkeys(("a", "model_a", "response_a", "conversation_a"), ("a", "b")),
    **dict.fromkeys(("b", "model_b", "response_b", "conversation_b"), ("b", "a")),
}
STATES_PROMPT = ("question", "query", "instruction", "messages", "conversations", "history", *columns.EXTRA, *SYSTEM)


def _read_pair(row: dict) -> Pair:
    """TRL's explicit prompt. If a text precedes two conversations, their prompt is their common start, and
    the text has to be one of its messages."""
    prompt, tools = row["prompt"], fields.tools(row.get("tools"))
    if isinstance(prompt, list):
        context = with_system(row, check_messages(prompt, "prompt"))
        sides = (_after(context, fields.answer_messages(row[side], side), side) for side in SIDES)
        return _conversation_pair(context, *sides, tools)
    if not isinstance(row["chosen"], list):
        columns.refuse_beside_text(row)
        return _text_pair(fields.text(prompt, "prompt"), *(fields.answer(row[side], side) for side in SIDES))
    pair = _read_implicit_pair(row)
    if prompt not in [message["content"] for message in pair.chosen.messages[: pair.chosen.trained_from]]:
        raise BadRow(
            Fault.TWO_PROMPTS,
            f"prompt is {fields.show(prompt)}: it must be one of the messages that chosen and rejected begin with",
        )
    return pair


def _read_implicit_pair(row: dict) -> Pair:
    """TRL's implicit prompt: the common beginning of two texts or of two conversations."""
    if isinstance(row["chosen"], list):
        chosen, rejected = (fields.answer_messages(row[side], side) for side in SIDES)
        common = _common_length(chosen, rejected)
        context = with_system(row, chosen[:common]) if common else []
        return _conversation_pair(context, chosen[common:], rejected[common:], fields.tools(row.get("tools")))
    for name in STATES_PROMPT:
        if columns.is_stated(row.get(name)):
            raise BadRow(
                Fault.TWO_PROMPTS,
                f"the row has `{name}`, but the prompt would be the texts' common beginning: rename the column to prompt, "
                "or remove it",
            )
    chosen, rejected = (fields.answer(row[side], side) for side in SIDES)
    _refuse_equal(chosen, rejected)
    common = _common_length(chosen, rejected)
    if chosen[:common].endswith(" "):  # TRL leaves the space to the answers
        common -= 1
    if not common:
        raise BadRow(Fault.TWO_PROMPTS, "chosen and rejected have no common beginning: give the prompt")
    return _text_pair(chosen[:common], chosen[common:], rejected[common:])


def _asked_pair(question: str) -> Callable[[dict], Pair]:
    """A reader of rows whose prompt is a question in its own column."""

    def read(row: dict) -> Pair:
        if isinstance(row["chosen"], list):  # whole conversations
            return _read_implicit_pair(row)
        sides = ([said("assistant", fields.answer(row[side], side))] for side in SIDES)
        return _conversation_pair(asked(row, question), *sides, fields.tools(row.get("tools")))

    return read


def _read_sharegpt_pair(row: dict) -> Pair:
    context = with_system(row, sharegpt_messages(row["conversations"], "conversations"))
    return _conversation_pair(context, *(_side(row[side], side) for side in SIDES), fields.tools(row.get("tools")))


def _side(value: Any, name: str) -> list[dict]:
    """An answer as text, as a turn, or as several."""
    if isinstance(value, str):
        return [said("assistant", fields.answer(value, name))]
    messages = sharegpt_messages(value if isinstance(value, list) else [value], name)
    fields.require_answer(messages, name)
    return messages


def _judged_pair(column: str) -> Callable[[dict], Pair]:
    """A reader of rows with sides a and b, of which `winner` names the preferred one."""

    def read(row: dict) -> Pair:
        chosen, rejected = _winner(row["winner"])
        sides = {"chosen": row[f"{column}_{chosen}"], "rejected": row[f"{column}_{rejected}"]}
        rest = {name: value for name, value in row.items() if name not in (f"{column}_a", f"{column}_b", "winner")}
        if column == "conversation":
            return _read_implicit_pair(rest | sides)
        is_conversation = isinstance(row["prompt"], list)
        return _read_pair(rest | {name: _turns(side) if is_conversation else side for name, side in sides.items()})

    return read


def _turns(answer: Any) -> Any:
    return [said("assistant", answer)] if isinstance(answer, str) else answer


def _winner(value: Any) -> tuple[str, str]:
    """The letters of the preferred side and of the other one. Raises BadRow, also for a tie."""
    word = value.strip().lower() if isinstance(value, str) else value
    if word in TIES:
        raise _tie("winner", value)
    if word not in WINNERS:
        raise BadRow(Fault.FIELD, f"winner is {fields.show(value)}: it must be a, b (or model_a, model_b) or tie")
    return WINNERS[word]


def _tie(name: str, value: Any) -> BadRow:
    return BadRow(
        Fault.TIE,
        f"{name} is {fields.show(value)}: neither side is preferred, and no stage trains on ties; leave it out",
    )


def refuse_tie(row: dict) -> None:
    """Raises BadRow for a pair of which a column next to it says that neither side is preferred."""
    for name in ("tie", "is_tie", "winner_tie"):
        if row.get(name) in (True, 1):
            raise _tie(name, row[name])
    for name in ("winner", "preference", "verdict", "outcome"):
        value = row.get(name)
        if isinstance(value, str) and value.strip().lower() in TIES:
            raise _tie(name, value)


def _read_token_pair(row: dict) -> Pair:
    prompt = fields.integers(row["prompt_ids"], "prompt_ids", may_be_empty=True)
    chosen, rejected = (fields.integers(row[name], name) for name in ("chosen_ids", "rejected_ids"))
    _refuse_equal(chosen, rejected)
    return Pair(*(TokenIds(prompt + side, len(prompt)) for side in (chosen, rejected)))


def _text_pair(prompt: str, chosen: str, rejected: str) -> Pair:
    _refuse_equal(chosen, rejected)
    for answer, side in zip((chosen, rejected), SIDES, strict=True):
        if not answer.strip():
            raise BadRow(Fault.EMPTY, f"{side} is empty after the prompt: there is nothing to train on")
    return Pair(Completion(prompt, chosen), Completion(prompt, rejected))


def _conversation_pair(context: list[dict], chosen: list[dict], rejected: list[dict], tools: list[dict] | None) -> Pair:
    """Two continuations of one conversation. What users say in them must be the same, or the prompts differ."""
    _refuse_equal(chosen, rejected)
    if not context:
        raise BadRow(Fault.TWO_PROMPTS, "chosen[0] differs from rejected[0]: both must begin with the same prompt")
    asked = [[message for message in side if message["role"] == "user"] for side in (chosen, rejected)]
    if asked[0] != asked[1]:
        at = len(context) + _common_length(chosen, rejected)
        raise BadRow(
            Fault.TWO_PROMPTS, f"from message {at} on chosen and rejected hold different user turns: give both the same"
        )
    for messages, side in zip((chosen, rejected), SIDES, strict=True):
        if not any(message["role"] == "assistant" for message in messages):
            raise BadRow(Fault.EMPTY, f"{side} is empty after the prompt: there is nothing to train on")
    return Pair(*(Conversation(context + side, tools, len(context)) for side in (chosen, rejected)))


def _after(context: list[dict], messages: list[dict], name: str) -> list[dict]:
    """The messages after the prompt, if a side repeats it."""
    if messages[0]["role"] == "assistant":
        return messages
    common = _common_length(context, messages)
    if common < len(context):
        raise BadRow(
            Fault.TWO_PROMPTS,
            f"{name}[{common}] differs from prompt[{common}]: begin with the answer, or repeat the prompt as it is",
        )
    return messages[common:]


def _refuse_equal(chosen: Any, rejected: Any) -> None:
    if chosen == rejected:
        raise BadRow(Fault.EQUAL_SIDES, "chosen equals rejected: there is nothing to prefer")


def _common_length(one: Sequence, other: Sequence) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


PAIR_FORMATS: dict[tuple[str, ...], Format] = {
    ("prompt", "chosen", "rejected"): Format(_read_pair, (*SYSTEM, "tools")),
    ("conversations", "chosen", "rejected"): Format(_read_sharegpt_pair, (*SYSTEM, "tools")),
    ("question", "chosen", "rejected"): Format(_asked_pair("question"), ASKED),
    ("instruction", "chosen", "rejected"): Format(_asked_pair("instruction"), ASKED),
    ("chosen", "rejected"): Format(_read_implicit_pair, (*SYSTEM, "tools")),
    ("conversation_a", "conversation_b", "winner"): Format(_judged_pair("conversation"), (*SYSTEM, "tools")),
    ("prompt", "response_a", "response_b", "winner"): Format(_judged_pair("response"), (*SYSTEM, "tools")),
    ("prompt_ids", "chosen_ids", "rejected_ids"): Format(_read_token_pair, strict=False),
}
