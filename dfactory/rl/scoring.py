"""From decoded groups to rewards: the reward pool seen from the controller, and the table of sample completions."""

import asyncio
import dataclasses
import json
from collections import Counter
from pathlib import Path

from dfactory import faults
from dfactory.config.recipe import Recipe
from dfactory.rl.advantage import GroupAdvantages
from dfactory.rl.prompts import PromptStream
from dfactory.rl.reward_pool import RewardGroup, RewardPool, RewardResult, outcome_counts
from dfactory.rl.rewards.specs import parse_rewards
from dfactory.rl.rollouts import DecodedGroup, ScoredRollout

SAMPLES = "completions.jsonl"
SAMPLE_GROUPS = 2  # of a step that are written down whole


@dataclasses.dataclass(frozen=True)
class ScoredGroup:
    """A decoded group with its rewards, and after `with_advantages` with those."""

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
        """Those that have a reward."""
        return [
            ScoredRollout(self.number, index, rollout, reward, float(self.advantages.advantage_G[index]))
            for index, (rollout, reward) in enumerate(zip(self.decoded.rollouts, self.rewards, strict=True))
            if reward is not None
        ]


class Scorer:
    """Scores groups in the processes of a RewardPool, without holding up the controller."""

    def __init__(self, recipe: Recipe, prompts: PromptStream):
        self.prompts = prompts
        self.samples_path = Path(recipe.output_dir) / SAMPLES
        specs = parse_rewards(
            recipe.reward_funcs, recipe.reward_weights, allow_code_execution=recipe.allow_code_execution
        )
        self.pool = RewardPool(
            specs,
            workers=recipe.reward_workers,
            timeout_s=recipe.reward_timeout_s,
            memory_mb=recipe.reward_worker_memory_mb,
        )
        self._outcomes: Counter[str] = Counter()

    async def score(self, decoded: DecodedGroup) -> ScoredGroup:
        loop = asyncio.get_running_loop()
        started = loop.time()
        texts = [self.prompts.vocabulary.text(rollout.output_ids) for rollout in decoded.rollouts]
        prompt, row = self.prompts.prompt(decoded.number), self.prompts.row(decoded.number)
        group = RewardGroup.of(prompt, decoded.rollouts, texts, row.fields)
        result = await asyncio.wrap_future(self.pool.submit(group))
        for (name, outcome), count in outcome_counts([result]).items():
            self._outcomes[f"{name}/{outcome.value}"] += count
        return ScoredGroup(decoded, texts, result, loop.time() - started)

    def outcomes(self) -> dict[str, int]:
        """How often each function ended how, in rollouts: `exact_match/ok`, `exact_match/timeout`."""
        return dict(self._outcomes)

    def write_samples(self, step: int, groups: list[ScoredGroup]) -> None:
        """Append the first groups of a step to the run's table of completions."""
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
