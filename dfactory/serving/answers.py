"""One answer while it is decoded: from the decoder's progress to text that will not change any more.

Text is released block by block, when a block is finished. Held back are the bytes of an incomplete character, and text
that could be the start of a stop text.
"""

import asyncio
from typing import NamedTuple

from dfactory.decoding import Progress
from dfactory.types import FinishReason, Rollout
from dfactory.vocabulary import Vocabulary

STOP = "stop"  # the finish reason after a stop text


class News(NamedTuple):
    """What an answer has gained since the last News."""

    forwards: int
    added_ids: list[int]  # of newly finished blocks
    rollout: Rollout | None  # of a complete answer


class ProgressQueue:
    """Carries the progress of each answer from the decoder's thread to the event loop. Forwards that finish no block are
    left out, and without `by_block` all but the last, so that the queue of a slow client never exceeds its answer."""

    def __init__(self, answers: int, *, by_block: bool):
        self.by_block = by_block
        self.settled = [0] * answers
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[tuple[int, News | None]] = asyncio.Queue()

    def report(self, index: int, progress: Progress | None) -> None:
        """Queue what is new of an answer; None means that it will not be completed. Call it from any thread."""
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
    """`text` is what has been released so far; `finish_reason` is None until the answer is complete."""

    def __init__(self, vocabulary: Vocabulary, stop: tuple[str, ...], prompt_tokens: int):
        self.vocabulary, self.stop, self.prompt_tokens = vocabulary, stop, prompt_tokens
        self.text = ""
        self.token_ids: list[int] = []  # of finished blocks; at the end those of the answer, EOS included
        self.forwards = 0
        self.finish_reason: str | None = None

    def add(self, news: News) -> str:
        """Add progress. Returns the text that it releases. The time grows with the answer."""
        self.forwards, rollout = news.forwards, news.rollout
        self.token_ids = rollout.output_ids if rollout else self.token_ids + news.added_ids
        if rollout:
            self.finish_reason = rollout.finish_reason.value
        whole = (self.vocabulary.text if rollout else self.vocabulary.beginning)(self.token_ids) or ""
        ends = [at for at in (whole.find(stop) for stop in self.stop) if at >= 0]
        if ends:
            whole, self.finish_reason = whole[: min(ends)], STOP
        elif not rollout:
            whole = whole[: len(whole) - self._doubtful(whole)]
        added = whole[len(self.text) :]
        self.text += added
        return added

    def _doubtful(self, text: str) -> int:
        """Length of the longest suffix of `text` that is a prefix of a stop text."""
        return max((overlap(text, stop) for stop in self.stop), default=0)

    @property
    def openai_reason(self) -> str | None:
        """The reason as OpenAI names it: `stop`, for EOS too, or `length`."""
        return STOP if self.finish_reason == FinishReason.EOS else self.finish_reason


def usage(answers: list[Answer], prompts: int) -> dict[str, float]:
    """OpenAI's counts, in which each prompt counts once, and the number of forwards."""
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
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
