"""One answer while it comes: from what the decoder says after a forward to text that will not change any more.

Text leaves block by block, when a block is finished. Held back are the bytes of a character that is not complete, and
whatever could be the beginning of a stop text.
"""

import asyncio
from typing import NamedTuple

from dfactory.decoding import Progress
from dfactory.types import FinishReason, Rollout
from dfactory.vocabulary import Vocabulary

STOP = "stop"  # the finish reason where a stop text came
INCOMPLETE = "\ufffd"  # what a tokenizer makes of the bytes of half a character


class News(NamedTuple):
    """What an answer has gained since the last time."""

    forwards: int
    added_ids: list[int]  # of blocks that are finished now
    rollout: Rollout | None  # when the answer is


class Hearer:
    """From the decoder's thread to the event loop: what is new of each answer. Forwards that finish no block are left out,
    and without `by_block` all but the last, so that a client who reads slowly piles up no more than its answer."""

    def __init__(self, answers: int, *, by_block: bool):
        self.by_block = by_block
        self.settled = [0] * answers
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[tuple[int, News | None]] = asyncio.Queue()

    def hear(self, index: int, progress: Progress | None) -> None:
        """Called from any thread; None where no answer will come."""
        if progress is None:
            self._put(index, None)
        elif progress.rollout is not None or (self.by_block and progress.settled > self.settled[index]):
            added = progress.token_ids[self.settled[index] : progress.settled]
            self.settled[index] = progress.settled
            self._put(index, News(progress.forwards, added, progress.rollout))

    def _put(self, index: int, news: News | None) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.queue.put_nowait, (index, news))

    async def next(self) -> tuple[int, News | None]:
        return await self.queue.get()


class Answer:
    """`text` is all that has left; `finish_reason` is None until the answer is complete."""

    def __init__(self, vocabulary: Vocabulary, stop: tuple[str, ...], prompt_tokens: int):
        self.vocabulary, self.stop, self.prompt_tokens = vocabulary, stop, prompt_tokens
        self.text = ""
        self.token_ids: list[int] = []  # of finished blocks; at the end those of the answer, EOS included
        self.forwards = 0
        self.finish_reason: str | None = None

    def hear(self, news: News) -> str:
        """The text that this adds. Takes a time that grows with the answer."""
        self.forwards, rollout = news.forwards, news.rollout
        self.token_ids = rollout.output_ids if rollout else self.token_ids + news.added_ids
        if self.vocabulary.tokenizer is None:
            whole = ""
        else:
            whole = self.vocabulary.text(self.token_ids)
        if rollout:
            self.finish_reason = rollout.finish_reason.value
        else:
            whole = whole.rstrip(INCOMPLETE)
        ends = [at for at in (whole.find(stop) for stop in self.stop) if at >= 0]
        if ends:
            whole, self.finish_reason = whole[: min(ends)], STOP
        elif not rollout:
            whole = whole[: len(whole) - self._doubtful(whole)]
        added = whole[len(self.text) :]
        self.text += added
        return added

    def _doubtful(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop text begins."""
        return max((overlap(text, stop) for stop in self.stop), default=0)

    @property
    def openai_reason(self) -> str | None:
        """OpenAI knows `stop`, for EOS too, and `length`."""
        return STOP if self.finish_reason == FinishReason.EOS else self.finish_reason


def usage(answers: list[Answer], prompts: int) -> dict[str, float]:
    """OpenAI's counts, of which each prompt is counted once, and the forwards besides."""
    step = len(answers) // prompts
    prompt_tokens = sum(answer.prompt_tokens for answer in answers[::step])
    tokens = sum(len(answer.token_ids) for answer in answers)
    forwards = sum(answer.forwards for answer in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
        "forwards": forwards,
        "tokens_per_forward": tokens / max(forwards, 1),
    }


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins but does not end."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
