"""Denoising for display: the state of every token of the response after each forward.

Each state has its own style and mark, so that a terminal without colours shows the same:

    The cat ~sat~ on ⟨the mat⟩███     committed, one edited, two drafted, three masks without a likely draft
"""

import enum
import itertools
import math
from typing import NamedTuple

from dfactory.decoding import Progress
from dfactory.types import Answer
from dfactory.vocabulary import Vocabulary

LOG_SHOWN_FROM = math.log(0.1)  # log-probability of a draft that is worth showing
MASK, END = "█", "·"  # a mask; the end of the answer and of its turn, and the fill of its last block


class State(enum.StrEnum):
    MASKED = "masked"
    DRAFTED = "drafted"  # still a mask, shown as the token that the model would put there
    COMMITTED = "committed"
    FRESH = "fresh"  # committed by this forward
    EDITED = "edited"  # another token than the one that had been committed


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
    rule: str  # by which it was decided, as a DecodingRule shows itself
    runs: tuple[Run, ...]
    settled: str = ""  # text of finished blocks, which only grows
    answer: Answer | None = None  # in the last frame

    @property
    def marked(self) -> str:
        """The whole response, masks included, with the marks of its states."""
        return "".join(run.marked for run in self.runs)

    @property
    def rate(self) -> str:
        return f"forward {self.forwards}, {self.tokens} tokens, {self.tokens / max(self.forwards, 1):.2f} a forward"


class Denoising:
    """The frames of one response, from the decoder's progress in order."""

    def __init__(self, vocabulary: Vocabulary, block_size: int):
        self.vocabulary, self.block_size = vocabulary, block_size
        self.before: list[int] = []
        self.edited: set[int] = set()
        self.settled, self.settled_tokens = "", 0

    def frame(self, progress: Progress, rule: str) -> Frame:
        mask = self.vocabulary.special.mask
        shown = list(zip(self.states(progress), progress.draft_ids, strict=True))
        if progress.rollout is None and progress.settled == len(progress.token_ids):
            shown += [(State.MASKED, mask)] * self.block_size  # the next block
        runs = [
            Run(state, self._text(state, [token for _, token in run]))
            for state, run in itertools.groupby(shown, key=lambda pair: pair[0])
        ]
        committed = sum(token != mask for token in progress.token_ids)
        answer = None if progress.rollout is None else self.vocabulary.answer(progress.rollout)
        return Frame(progress.forwards, committed, rule, tuple(runs), self._settled(progress, answer), answer)

    def states(self, progress: Progress) -> list[State]:
        """The state of each of the tokens. Call it once for each progress, in order."""
        states = [self._state(index, progress) for index in range(len(progress.token_ids))]
        self.before = progress.token_ids
        return states

    def _settled(self, progress: Progress, answer: Answer | None) -> str:
        if answer is not None:
            return answer.text or ""
        if progress.settled > self.settled_tokens:
            self.settled_tokens = progress.settled
            self.settled = self.vocabulary.beginning(progress.token_ids[: progress.settled]) or ""
        return self.settled

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
        parts.append(END * len(ids) if is_end else vocabulary.ranges.written(ids, vocabulary.tokenizer.decode))
    return printable("".join(parts))


def printable(text: str) -> str:
    """The text without control characters, so that a model's output cannot control the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else " " if c == "\t" else "�" for c in text)
