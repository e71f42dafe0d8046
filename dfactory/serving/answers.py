"""One answer while it comes: from what the decoder says after a forward to text that will not change any more.

Text leaves block by block, when a block is finished. Held back are the bytes of a character that is not complete, and
whatever could be the beginning of a stop text.
"""

from dfactory.decoding import Progress
from dfactory.types import FinishReason
from dfactory.vocabulary import Vocabulary

STOP = "stop"  # the finish reason where a stop text came
INCOMPLETE = "\ufffd"  # what a tokenizer makes of the bytes of half a character


class Answer:
    """`text` is all that has left; `finish_reason` is None until the answer is complete."""

    def __init__(self, vocabulary: Vocabulary, stop: tuple[str, ...], prompt_tokens: int):
        self.vocabulary, self.stop, self.prompt_tokens = vocabulary, stop, prompt_tokens
        self.text = ""
        self.token_ids: list[int] = []  # of finished blocks; at the end those of the answer, EOS included
        self.forwards = 0
        self.finish_reason: str | None = None

    def hear(self, progress: Progress) -> str:
        """The text that this forward adds."""
        self.forwards = progress.forwards
        rollout = progress.rollout
        self.token_ids = rollout.output_ids if rollout else progress.token_ids[: progress.settled]
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
        lengths = (n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(lengths, default=0)

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
