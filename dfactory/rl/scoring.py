"""Scores decoded groups: the controller's side of the reward pool, and the file of sample completions."""

import asyncio
import dataclasses
import json
from collections import Counter
from pathlib import Path

from dfactory import faults
from dfactory.recipe import Recipe
from dfactory.rl.advantage import GroupAdvantages
from dfactory.rl.prompts import PromptStream
from dfactory.rl.rewards.pool import RewardGroup, RewardPool, RewardResult, failure_messages, outcome_counts
from dfactory.rl.rewards.specs import RewardSpec, parse_rewards
from dfactory.rl.rollouts import DecodedGroup, ScoredRollout

SAMPLES = "completions.jsonl"
GROUPS = "groups.jsonl"
KINDS_OF_FAILURE = 100  # distinct messages of failed rewards that are remembered
SAMPLE_GROUPS = 2  # of a step that are written down whole


@dataclasses.dataclass(frozen=True)
class ScoredGroup:
    """A decoded group with its rewards, and after `with_advantages` with its advantages."""

    decoded: DecodedGroup
    texts: list[str]
    result: RewardResult
    seconds: float  # of scoring
    advantages: GroupAdvantages | None = None

    @property
    def number(self) -> int:
        return self.decoded.number

    @property
    def rewards(self) -> list[float | None]:
        return self.result.reward_G

    @property
    def has_signal(self) -> bool:
        return self.advantages.has_signal

    def with_advantages(self, advantages: GroupAdvantages) -> "ScoredGroup":
        return dataclasses.replace(self, advantages=advantages)

    def rollouts(self) -> list[ScoredRollout]:
        """The rollouts that have a reward."""
        old = self.decoded.old_logprobs or [None] * len(self.decoded.rollouts)
        advantages = self.advantages.advantage_G.tolist()
        return [
            ScoredRollout(self.number, index, rollout, reward, advantage, self.decoded.version, old_logprob)
            for index, (rollout, reward, advantage, old_logprob) in enumerate(
                zip(self.decoded.rollouts, self.rewards, advantages, old, strict=True)
            )
            if reward is not None
        ]


def check_rewards(recipe: Recipe) -> None:
    """Read the prompts, load the recipe's rewards in a separate process, and let them check every record. Raises DataError
    or ConfigError."""
    rows = [(row.origin, row.fields) for row in PromptStream(recipe).rows]
    RewardPool(_specs(recipe), workers=1, rows=rows).close()


def _specs(recipe: Recipe) -> list[RewardSpec]:
    return parse_rewards(recipe.reward_funcs, recipe.reward_weights, allow_code_execution=recipe.allow_code_execution)


class Scorer:
    """Scores groups in the processes of a RewardPool, without blocking the controller."""

    def __init__(self, recipe: Recipe, prompts: PromptStream):
        self.prompts = prompts
        self.samples_path = Path(recipe.output_dir) / SAMPLES
        self.groups_path = Path(recipe.output_dir) / GROUPS
        self.pool = RewardPool(
            _specs(recipe),
            workers=recipe.reward_workers,
            timeout_s=recipe.reward_timeout_s,
            memory_mb=recipe.reward_worker_memory_mb,
        )
        self._outcomes: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()

    async def score(self, decoded: DecodedGroup) -> ScoredGroup:
        loop = asyncio.get_running_loop()
        started = loop.time()
        answers = [self.prompts.vocabulary.answer(rollout) for rollout in decoded.rollouts]
        prompt, row = self.prompts.prompt(decoded.number), self.prompts.row(decoded.number)
        group = RewardGroup.of(prompt, answers, row.fields)
        result = await asyncio.wrap_future(self.pool.submit(group))
        for (name, outcome), count in outcome_counts([result]).items():
            self._outcomes[f"{name}/{outcome.value}"] += count
        self._remember(failure_messages([result]), decoded.number)
        return ScoredGroup(decoded, [answer.text for answer in answers], result, loop.time() - started)

    def outcomes(self) -> dict[str, int]:
        """Rollouts by reward function and outcome: `exact_match/ok`, `exact_match/timeout`."""
        return dict(self._outcomes)

    def complaints(self) -> str:
        """The most common messages of failed rewards, in brackets; empty if none failed."""
        common = [f"{message} ({count} times)" for message, count in self._failures.most_common(3)]
        return f" ({'; '.join(common)})" if common else ""

    def _remember(self, failures: Counter[str], group: int) -> None:
        """Count failures, and print each kind once."""
        for message, count in failures.items():
            if message not in self._failures and len(self._failures) < KINDS_OF_FAILURE:
                print(f"group {group} ({self.prompts.origin(group)}): {message}", flush=True)
                self._failures[message] = 0
            if message in self._failures:
                self._failures[message] += count

    def write_groups(self, step: int, seen: list[ScoredGroup], used: list[ScoredGroup]) -> None:
        """Append a line with the groups that a step collected, the version that decoded each, and those that it trains on.
        A resumed run drops the lines of the steps that it repeats (runs/folder.py)."""
        line = {
            "step": step,
            "groups": [group.number for group in seen],
            "versions": [group.decoded.version for group in seen],
            "trained": [group.number for group in used if group.has_signal],
        }
        self.groups_path.parent.mkdir(parents=True, exist_ok=True)
        with self.groups_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def write_samples(self, step: int, groups: list[ScoredGroup]) -> None:
        """Append the first groups of a step to the run's file of completions."""
        self.samples_path.parent.mkdir(parents=True, exist_ok=True)
        with self.samples_path.open("a", encoding="utf-8") as file:
            before = file.tell()
            for group in groups[:SAMPLE_GROUPS]:
                for index, rollout in enumerate(group.decoded.rollouts):
                    line = {
                        "step": step,
                        "group": group.number,
                        "origin": self.prompts.origin(group.number),
                        "prompt": self.prompts.prompt(group.number),
                        "completion": group.texts[index],
                        "reward": group.rewards[index],
                        **{name: scores.score_G[index] for name, scores in group.result.functions.items()},
                        "advantage": float(group.advantages.advantage_G[index]),
                        "tokens_per_forward": rollout.tokens_per_forward,
                        "version": group.decoded.version,
                    }
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        faults.at("completions.jsonl.appended", self.samples_path, before)

    def close(self) -> None:
        self.pool.close()
