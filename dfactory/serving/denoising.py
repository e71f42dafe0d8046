"""Denoising for display: the state of every token of the response after each forward.

Each state has its own style and mark, so that a terminal without colours shows the same:

    The cat ~sat~ on ⟨the mat⟩███     committed, one edited, two drafted, three masks without a likely draft
"""

import enum
import itertools
import math
from typing import NamedTuple

from rich.text import Text

from dfactory.decoding import Progress
from dfactory.vocabulary import Vocabulary

LOG_SHOWN_FROM = math.log(0.1)  # log-probability of a draft that is worth showing
MASK, END = "█", "·"  # a mask; the end of the answer and of its turn, and the fill of its last block


class State(enum.StrEnum):
    MASKED = "masked"
    DRAFTED = "drafted"  # still a mask, shown as the token that the model would put there
    COMMITTED = "committed"
    FRESH = "fresh"  # committed by this forward
    EDITED = "edited"  # another token than the one that had been committed


STYLES = {
    State.MASKED: "bright_black",
    State.DRAFTED: "italic magenta",
    State.COMMITTED: "",
    State.FRESH: "bold green",
    State.EDITED: "underline yellow",
}
MARKS = {State.DRAFTED: ("⟨", "⟩"), State.EDITED: ("~", "~")}


class Run(NamedTuple):
    """Neighbouring tokens of one state."""

    state: State
    text: str

    @property
    def marked(self) -> str:
        before, after = MARKS.get(self.state, ("", ""))
        return f"{before}{self.text}{after}"


class Frame(NamedTuple):
    """The response after a forward, as it is displayed."""

    forwards: int
    tokens: int  # that are committed
    threshold: float | None
    runs: tuple[Run, ...]

    @property
    def text(self) -> Text:
        return Text.assemble(*((run.marked, STYLES[run.state]) for run in self.runs))

    @property
    def rate(self) -> str:
        return f"forward {self.forwards}, {self.tokens} tokens, {self.tokens / max(self.forwards, 1):.2f} a forward"


class Denoising:
    """The frames of one response, from the decoder's progress in order."""

    def __init__(self, vocabulary: Vocabulary, block_size: int):
        self.vocabulary, self.block_size = vocabulary, block_size
        self.before: list[int] = []
        self.edited: set[int] = set()

    def frame(self, progress: Progress, threshold: float | None = None) -> Frame:
        mask = self.vocabulary.special.mask
        states = [self._state(index, progress) for index in range(len(progress.token_ids))]
        shown = list(zip(states, progress.draft_ids, strict=True))
        if progress.rollout is None and progress.settled == len(progress.token_ids):
            shown += [(State.MASKED, mask)] * self.block_size  # the next block
        self.before = progress.token_ids
        runs = [
            Run(state, self._text(state, [token for _, token in run]))
            for state, run in itertools.groupby(shown, key=lambda pair: pair[0])
        ]
        committed = sum(token != mask for token in progress.token_ids)
        return Frame(progress.forwards, committed, threshold, tuple(runs))

    def _state(self, index: int, progress: Progress) -> State:
        token, mask = progress.token_ids[index], self.vocabulary.special.mask
        if token == mask:
            sure = progress.draft_logprobs[index] >= LOG_SHOWN_FROM
            return State.DRAFTED if sure and progress.draft_ids[index] != mask else State.MASKED
        old = self.before[index] if index < len(self.before) else mask
        if old not in (token, mask):
            self.edited.add(index)
        if index in self.edited:
            return State.EDITED
        return State.COMMITTED if old == token else State.FRESH

    def _text(self, state: State, token_ids: list[int]) -> str:
        if state == State.MASKED:
            return MASK * len(token_ids)
        return shown_text(self.vocabulary, token_ids)


def shown_text(vocabulary: Vocabulary, token_ids: list[int]) -> str:
    """Printable text of tokens: special tokens as END, and no control characters but line ends."""
    if vocabulary.tokenizer is None:
        return "".join(f"{token} " for token in token_ids)
    ends, parts = {*vocabulary.tokenizer.all_special_ids, vocabulary.special.eos}, []
    for is_end, run in itertools.groupby(token_ids, key=lambda token: token in ends):
        ids = list(run)
        parts.append(END * len(ids) if is_end else vocabulary.tokenizer.decode(ids))
    return printable("".join(parts))


def printable(text: str) -> str:
    """The text without control characters, so that a model's output cannot control the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else " " if c == "\t" else "�" for c in text)


def legend() -> Text:
    examples = [Run(State.MASKED, MASK * 2), Run(State.DRAFTED, "drafted"), Run(State.FRESH, "new")]
    examples += [Run(State.COMMITTED, "committed"), Run(State.EDITED, "edited")]
    named = {State.MASKED: " masked"}
    parts = (Text(run.marked, STYLES[run.state]) + Text(named.get(run.state, "")) for run in examples)
    return Text("   ").join(parts)
