"""Which of a model's own answers become records, and why the others do not."""

import argparse
import enum
from collections import Counter
from collections.abc import Sequence

from dfactory.data.answers import compiled_pattern
from dfactory.data_tools.asked import Prompt
from dfactory.data_tools.teacher import Reply
from dfactory.rl.rewards.exact_match import same_text
from dfactory.rl.rewards.pool import RewardGroup, RewardPool, failure_messages
from dfactory.rl.rewards.text import answer_text, captured_text
from dfactory.types import FinishReason

REPEATED = 8  # tokens that count as a repetition when they come again
SEARCH_S = 2.0  # of CPU time for --answer-pattern in one answer


class Verdict(enum.StrEnum):
    """The values are what reports count."""

    WRITTEN = "written"
    CUT = "cut at --max-new-tokens"
    EMPTY = "empty"
    REPEATING = "repetitive"
    WRONG = "wrong"
    UNSCORED = "unscored"


class Judge:
    """Applies --keep, --drop-repeats, --answer-pattern, --reward and --correct-from. `pool` is None without rewards."""

    def __init__(self, options: argparse.Namespace, pool: RewardPool | None):
        self._keeps_cut, self._most_repeats = options.keep == "all", options.drop_repeats
        self._pattern = compiled_pattern(options.answer_pattern, "--answer-pattern")
        self._pool, self._correct_from = pool, options.correct_from
        self.failures: Counter[str] = Counter()  # messages of rewards

    def verdicts(self, prompt: Prompt, replies: Sequence[Reply], texts: Sequence[str]) -> list[Verdict]:
        """Of the answers to one prompt."""
        found = [self._verdict(prompt, reply, text) for reply, text in zip(replies, texts, strict=True)]
        left = [index for index, verdict in enumerate(found) if verdict is Verdict.WRITTEN]
        if self._pool is not None and left:
            rewards = self._rewards(prompt, [replies[index] for index in left], [texts[index] for index in left])
            for index, reward in zip(left, rewards, strict=True):
                found[index] = self._scored(reward)
        return found

    def _verdict(self, prompt: Prompt, reply: Reply, text: str) -> Verdict:
        """By all but the rewards."""
        if not reply.is_finished and not self._keeps_cut:
            return Verdict.CUT
        if not text.strip():
            return Verdict.EMPTY
        if self._most_repeats is not None and most_repeats(reply.token_ids) > self._most_repeats:
            return Verdict.REPEATING
        return Verdict.WRITTEN if self._pattern is None else self._matched(prompt, text)

    def _matched(self, prompt: Prompt, text: str) -> Verdict:
        """Whether what the pattern captures is the row's answer."""
        try:
            answer = answer_text(prompt.fields.get("answer"))
        except ValueError:
            return Verdict.UNSCORED
        captured = captured_text(text, self._pattern, SEARCH_S)
        return Verdict.WRITTEN if captured is not None and same_text(captured, answer) else Verdict.WRONG

    def _rewards(self, prompt: Prompt, replies: Sequence[Reply], texts: Sequence[str]) -> list[float | None]:
        said, completions = prompt.said, list(texts)
        if not isinstance(said, str):
            completions = [[{"role": "assistant", "content": text}] for text in texts]
        reasons = [FinishReason.EOS if reply.is_finished else FinishReason.LENGTH for reply in replies]
        per_rollout = {
            "completion_ids": [reply.token_ids for reply in replies],
            "tokens_per_forward": [1.0] * len(replies),
            "forwards": [len(reply.token_ids) for reply in replies],
            "finish_reason": [reason.value for reason in reasons],
        }
        group = RewardGroup(said, completions, prompt.fields, per_rollout)
        (result,) = self._pool.score([group])
        self.failures += failure_messages([result])
        return result.reward_G

    def _scored(self, reward: float | None) -> Verdict:
        if reward is None:
            return Verdict.UNSCORED
        return Verdict.WRITTEN if reward >= self._correct_from else Verdict.WRONG


def most_repeats(token_ids: Sequence[int], length: int = REPEATED) -> int:
    """How often the most frequent run of `length` tokens occurs: 1 in a text that repeats nothing, 0 in a shorter one.

    a b a b a b a b with length 2: a b occurs 4 times.
    """
    runs = Counter(zip(*(token_ids[first:] for first in range(length)), strict=False))
    return max(runs.values(), default=0)
