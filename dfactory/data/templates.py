"""A conversation -> rendered text with the spans of its answers; nothing of it is left out without a word.

Answers come from the template's {% generation %} markers. A template without them is rendered with and without each turn; if
it rewrites earlier turns, trl's training version of it is used where there is one.

What a message says (`fields.TEXTS`, and its calls of tools) has to stand in the rendering. A long text is looked for
as it is, then without white space and as JSON, which templates write as well. A short one may stand there by chance:
the template is also rendered, once for each shape of conversation, with unmistakable texts in the place of all.
"""

import functools
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from dfactory.data.fields import TEXTS, BadRow, Conversation, Fault, is_trained
from dfactory.data.rendering import Rendered, render

GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE_TURN = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PROBE_CALL = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
SHORT = 24  # characters; a text of this length occurs in a rendering only because the template wrote it

Shape = tuple[tuple[str, tuple[str, ...]], ...]  # of each message: its role and the names of what it says


class Template:
    """One template, with the tokenizer whose special tokens it may write. Whatever goes wrong in it is a BadRow that names
    `origin`."""

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerBase, origin: str):
        self.tokenizer, self.origin = tokenizer, origin
        self.text = self._of_training(text)
        self.is_marked = bool(GENERATION_MARKER.search(self.text))
        self._unwritten = functools.lru_cache(maxsize=4096)(self._find_unwritten)

    def prompt(self, conversation: Conversation, variables: dict[str, Any]) -> str:
        """The text after which the model has to answer; the template is given `variables` besides. Earlier answers are the
        template's to shorten."""
        self._require_tools(conversation)
        messages, tools, *_ = conversation
        text = self._render(messages, tools, variables, add_generation_prompt=True).text
        self._require_texts(text, conversation, roles=("system", "user", "tool"))
        return text

    def document(self, conversation: Conversation) -> Rendered:
        """The text and the characters of the answers that are trained, end-of-turn token included."""
        self._require_tools(conversation)
        messages, tools, trained_from, _ = conversation
        text, spans = self._with_spans(messages, tools)
        self._require_texts(text, conversation)
        spans = self._trained(messages, spans)
        if trained_from:
            context = self._render(messages[:trained_from], tools).text
            self._require_prefix(context, text)
            spans = [span for span in spans if span[0] >= len(context)]
        return Rendered(text, spans)

    def _render(
        self, messages: list[dict], tools: list[dict] | None, variables: dict[str, Any] | None = None, **options: bool
    ) -> Rendered:
        variables = self.tokenizer.special_tokens_map | (variables or {})
        try:
            return render(self.text, messages, tools, variables=variables, **options)
        except Exception as problem:  # a program of a stranger's: it may raise anything
            told = (
                f"{problem}" if isinstance(problem, ValueError | TypeError) else f"{type(problem).__name__}: {problem}"
            )
            raise self._refusal(f"refuses the conversation: {told[:500]}") from problem

    def _refusal(self, what: str) -> BadRow:
        return BadRow(Fault.TEMPLATE, f"the chat template {self.origin} {what}")

    # --- where the answers are --------------------------------------------------------------------------------------

    def _with_spans(self, messages: list[dict], tools: list[dict] | None) -> Rendered:
        if self.is_marked:
            text, spans = self._render(messages, tools, spans=True)
            rest = self._rest_of_turn
            return Rendered(text, [(start, end + len(rest) * text.startswith(rest, end)) for start, end in spans])
        text, spans = self._render(messages, tools).text, []
        for index in (index for index, message in enumerate(messages) if message["role"] == "assistant"):
            before = self._render(messages[:index], tools, add_generation_prompt=True).text
            after = self._render(messages[: index + 1], tools).text
            self._require_prefix(before, after)
            self._require_prefix(after, text)
            spans.append((len(before), len(after)))
        return Rendered(text, spans)

    @functools.cached_property
    def _rest_of_turn(self) -> str:
        """The text after the generation markers of the last answer, which belongs to the turn too."""
        text, spans = self._probe(PROBE_TURN, spans=True)
        return text[spans[-1][1] :] if spans else ""

    def _trained(self, messages: list[dict], spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The spans without those of answers whose weight is 0."""
        answers = [message for message in messages if message["role"] == "assistant"]
        if all(map(is_trained, answers)):
            return spans
        if len(spans) != len(answers):
            raise self._refusal(
                f"marks {len(spans)} of {len(answers)} assistant turns, so those of weight 0 cannot be distinguished from "
                "the others"
            )
        return [span for span, answer in zip(spans, answers, strict=True) if is_trained(answer)]

    def _require_prefix(self, before: str, text: str) -> None:
        if not text.startswith(before):
            raise self._refusal(
                "renders earlier turns differently once later ones follow, so its assistant turns cannot be located: give a "
                "template with {% generation %} markers as chat_template_path"
            )

    def _of_training(self, text: str) -> str:
        """The template itself if its assistant turns can be located, else trl's training version of it if there is one."""
        self.text = text
        if self.tokenizer.chat_template != text or GENERATION_MARKER.search(text) or self._keeps_prefixes():
            return text
        try:
            from trl.chat_template_utils import get_training_chat_template
        except ImportError:
            return text
        try:
            return get_training_chat_template(self.tokenizer) or text
        except ValueError:  # trl does not know it either: the first conversation with two answers will say so
            return text

    def _keeps_prefixes(self) -> bool:
        stages = [self._probe(PROBE_TURN[:1], add_generation_prompt=True).text]
        stages += [self._probe(PROBE_TURN * count).text for count in (1, 2)]
        return all(longer.startswith(shorter) for shorter, longer in itertools.pairwise(stages))

    def _probe(self, messages: list[dict], tools: list[dict] | None = None, **options: bool) -> Rendered:
        """A small conversation rendered; nothing where the template wants something else."""
        try:
            return self._render(messages, tools, **options)
        except BadRow:  # a record that it refuses says so itself
            return Rendered("", [])

    # --- what is left out -------------------------------------------------------------------------------------------

    def _require_tools(self, conversation: Conversation) -> None:
        wanted = {"tools": conversation.tools, "tool_calls": any(m.get("tool_calls") for m in conversation.messages)}
        for name, is_there in wanted.items():
            if is_there and name not in self.text:
                raise BadRow(
                    Fault.TEMPLATE,
                    f"the conversation has {name}, which the chat template does not write ({self.origin}): give one that "
                    "does as chat_template_path, or remove them",
                )

    def _require_texts(self, text: str, conversation: Conversation, roles: tuple[str, ...] | None = None) -> None:
        """Raises BadRow for a message that says something which is not in the rendering."""
        messages, some_short = conversation.messages, False
        for index, message in enumerate(messages):
            if roles is not None and message["role"] not in roles:
                continue
            for name, said in _says(message):
                some_short = some_short or len(said) < SHORT
                if said not in text and not _stands_in(said, text):
                    raise self._left_out(index, message, name)
        if some_short and len(messages) <= SHORT:
            shape = tuple(
                (m["role"], (*(n for n in TEXTS if m.get(n)), *("tool_calls",) * ("tool_calls" in m))) for m in messages
            )
            for index, name in self._unwritten(shape, bool(conversation.tools), roles is not None):
                if (roles is None or messages[index]["role"] in roles) and messages[index][name].strip():
                    raise self._left_out(index, messages[index], name)

    def _left_out(self, index: int, message: dict[str, Any], name: str) -> BadRow:
        return BadRow(
            Fault.TEMPLATE,
            f"messages[{index}].{name} (of {message['role']}) is not in what the chat template writes ({self.origin}): give "
            "one that writes it as chat_template_path, or remove it",
        )

    def _find_unwritten(
        self, shape: Shape, has_tools: bool, add_generation_prompt: bool
    ) -> tuple[tuple[int, str], ...]:
        """(message, field) of what the template leaves out of conversations of a shape."""
        marks = {(i, name): f"\U000fff00{i}{name}\U000fff01" for i, (_, names) in enumerate(shape) for name in names}
        messages = [
            {"role": role, "content": ""}
            | {name: PROBE_CALL if name == "tool_calls" else marks[i, name] for name in names}
            for i, (role, names) in enumerate(shape)
        ]
        tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}] if has_tools else None
        text = self._probe(messages, tools, add_generation_prompt=add_generation_prompt).text
        return (
            tuple(place for place, mark in marks.items() if place[1] != "tool_calls" and mark not in text)
            if text
            else ()
        )


def _says(message: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name of the field, text) of all that a message says."""
    for name in TEXTS:
        if said := message.get(name, "").strip():
            yield name, said
    for call in message.get("tool_calls", ()):
        function = call.get("function", call)
        for said in _texts_in((function.get("name"), function.get("arguments"))):
            yield "tool_calls", said


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if said := value.strip():
            yield said
    elif isinstance(value, dict):
        yield from _texts_in([*value, *value.values()])
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts_in(inner)


def _stands_in(said: str, text: str) -> bool:
    """Whether a rendering contains a text in another form: as JSON, or with other white space."""
    bare = _bare(text)
    forms = (said, json.dumps(said, ensure_ascii=False)[1:-1], json.dumps(said)[1:-1])
    return any(_bare(form) in bare for form in forms)


def _bare(text: str) -> str:
    return "".join(text.split())
