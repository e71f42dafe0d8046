"""An update of reinforcement learning beside the opponent's: rollout, reward, sync and training, in one run.

    python -m benchmarks.rl                        # ELBO views: a complementary pair a response
    python -m benchmarks.rl --prompts 1 --traces   # a group of 8, trained on the decoder's own steps
    python -m benchmarks.rl --main ../dFactory     # and the same updates by another checkout

Ours: groups of sampled responses from the cached decoder, which computes a prompt once a group; rows in which the
responses to a prompt share its clean stream and views; one step of the clipped policy gradient; the weights given to the
copy that decodes. The opponent decodes all responses as one batch, with the weights that it trains
(benchmarks/opponent_decoding.py), and trains on a noisy ++ clean row for every response and view; with `--traces` a view is
a step of the decoder in every block. As the ratio is 1 in the first step on new rollouts, neither computes old
log-probabilities, but for ours in the first update and every tenth, to compare. The opponent decodes responses of its own,
but both have ours to train on: the mean log-probability of their targets must be the same before every step.
"""

import argparse
import contextlib
import dataclasses
import inspect
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.local_client import Weights, copy_weights
from benchmarks.measuring import Elsewhere, Timed, interleave, row_of, write_rows
from benchmarks.opponent_decoding import PeerRules, decode_in_batches
from benchmarks.opponent_training import NoisyRow
from benchmarks.workload import (
    BLOCK,
    SHAPES,
    Opponent,
    Ours,
    noisy_row,
    sft_recipe,
    special_ids,
    text_ids,
    write_model,
)
from dfactory.algorithms.policy_gradient import PolicyGradient
from dfactory.algorithms.rollouts import RolloutViews, rollout_views
from dfactory.decoding import DecodeRules, decode
from dfactory.decoding.keys import DecodeKeys
from dfactory.models.registry import load_policy
from dfactory.noise import RandomMask
from dfactory.recipe import Recipe
from dfactory.rl.rollouts import RolloutBatch, ScoredRollout
from dfactory.rl.rows import rollout_document
from dfactory.rl.source import RolloutSource
from dfactory.types import Mean, Rollout

# An older checkout beside this one makes the pass at every update.
# what an earlier checkout's source may not know
KEYS = {"knows_ratio_1": True, "padded": torch.cuda.is_available()}
KEYS = {name: value for name, value in KEYS.items() if name in inspect.signature(RolloutSource).parameters}
TOLERANCE = 1e-4  # of the mean log-probability of a target, relative
PARTS = ("rollout", "reward", "sync", "train")


class Clock:
    """Seconds of the processor by part of one update."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)

    def measure(self, part: str, call: Callable):
        started = time.process_time()
        outcome = call()
        self.seconds[part] += time.process_time() - started
        return outcome

    def taken(self) -> dict[str, float]:
        """Of the update that ends here."""
        taken = {part: self.seconds[part] for part in PARTS}
        self.seconds.clear()
        return taken


class Setting(NamedTuple):
    prompts: list[list[int]]
    generations: int
    rules: DecodeRules
    peer_rules: PeerRules
    make_views: RolloutViews

    @property
    def prompt_of_each(self) -> list[list[int]]:
        return [prompt for prompt in self.prompts for _ in range(self.generations)]


def reward(rollout: Rollout) -> float:
    """Something to tell responses apart by: the share of even tokens."""
    return sum(token % 2 == 0 for token in rollout.token_ids) / len(rollout.token_ids)


def score_groups(rollouts: list[Rollout], generations: int) -> list[ScoredRollout]:
    """Rewards, and their distance from the mean of the group as advantage."""
    scored = []
    for group in range(len(rollouts) // generations):
        members = rollouts[group * generations : (group + 1) * generations]
        rewards = [reward(rollout) for rollout in members]
        mean = statistics.mean(rewards)
        scored += [
            ScoredRollout(group, i, r, v, v - mean) for i, (r, v) in enumerate(zip(members, rewards, strict=True))
        ]
    return scored


class TimedClient:
    """A policy that decodes in this process, with the clock running."""

    def __init__(self, model_dir: Path, setting: Setting, clock: Clock):
        self.actor, self.setting, self.clock = load_policy(model_dir, dtype="float32"), setting, clock
        self.scored: list[ScoredRollout] = []

    def publish(self, version: int, groups: Weights) -> dict[str, float]:
        self.clock.measure("sync", lambda: copy_weights(self.actor, groups))
        return {}

    def next_batch(self, version: int, next_group: int) -> RolloutBatch:
        s = self.setting
        prompts = s.prompt_of_each
        noise = [version * len(prompts) + index for index in range(len(prompts))]
        rollouts = self.clock.measure("rollout", lambda: decode(self.actor, prompts, s.rules, noise_ids=noise))
        self.scored = self.clock.measure("reward", lambda: score_groups(rollouts, s.generations))
        return RolloutBatch(self.scored, next_group + len(s.prompts), 0.0, {})


class OurUpdate:
    """A call is an update. Returns the mean log-probability of a target before it, and the seconds of the parts."""

    def __init__(self, spec: dict[str, Any]):
        recipe = recipe_of(spec)
        self.clock, self.setting = Clock(), make_setting(spec, recipe)
        self.ours = Ours(recipe)
        self.client = TimedClient(Path(spec["model"]), self.setting, self.clock)
        longest = (spec["prompt"] + 3 * spec["new_tokens"] + 2 * BLOCK) // BLOCK * BLOCK
        trainer = self.ours.trainer
        self.source = RolloutSource(
            *(self.client, trainer.weights, trainer.score, self.setting.make_views),
            block_size=BLOCK,
            row_length=max(2048, longest),
            rank=0,
            world_size=1,
            micro_batch_rows=1,
            **KEYS,
        )
        trainer.watch = lambda batch, scores: {"logprob": Mean(scores.logprob_N.detach().sum(), batch.num_targets)}

    def __call__(self, _: int) -> tuple[float, dict[str, float]]:
        started, before = time.process_time(), sum(self.clock.seconds.values())
        window = self.source.next_window()
        metrics = self.ours.trainer.train_window(window, PolicyGradient())
        elsewhere = sum(self.clock.seconds.values()) - before
        self.clock.seconds["train"] += time.process_time() - started - elsewhere
        return metrics["logprob"], self.clock.taken()


class OpponentUpdate:
    """As OurUpdate, on the rollouts that `scored` returns. -A w log p of every view, at a ratio of 1, divided by the
    response's length up to EOS."""

    def __init__(self, spec: dict[str, Any], scored: Callable[[], list[ScoredRollout]]):
        recipe = recipe_of(spec)
        self.clock, self.setting, self.scored = Clock(), make_setting(spec, recipe), scored
        self.training = Opponent(recipe).training

    def __call__(self, _: int) -> tuple[float, dict[str, float]]:
        s, scored = self.setting, self.scored()
        prompts = s.prompt_of_each
        self.clock.measure(
            "rollout", lambda: decode_in_batches(self.training.peer, prompts, s.peer_rules, len(prompts))
        )
        self.clock.measure("reward", lambda: score_groups([one.rollout for one in scored], s.generations))
        return self.clock.measure("train", lambda: self._train(scored)), self.clock.taken()

    def _train(self, scored: list[ScoredRollout]) -> float:
        rows = [row for one in scored for row in self._rows(one, len(scored))]
        return -self.training.train(rows).nll / sum(int(row.target_L.sum()) for row in rows)

    def _rows(self, one: ScoredRollout, responses: int) -> list[NoisyRow]:
        document, views = self.setting.make_views(rollout_document(one, BLOCK), one.index)
        scale = one.advantage / (responses * int(document.real_T.sum()))
        return [noisy_row(document, view, scale * view.elbo_weight_P) for view in views]


def side(spec: dict[str, Any]) -> OurUpdate:
    return OurUpdate(spec)


def recipe_of(spec: dict[str, Any]) -> Recipe:
    model_dir = Path(spec["model"])
    recipe = sft_recipe(model_dir, model_dir, spec["vocabulary"])
    return recipe if spec["traces"] else dataclasses.replace(recipe, policy_loss="ebpo")


def make_setting(spec: dict[str, Any], recipe: Recipe) -> Setting:
    mask, eos = special_ids(spec["vocabulary"])
    rng = random.Random(0)
    prompts = [rng.choices(text_ids(spec["vocabulary"]), k=spec["prompt"]) for _ in range(spec["prompts"])]
    shared = {"block_size": BLOCK, "max_new_tokens": spec["new_tokens"], "threshold": 0.95, "temperature": 1.0}
    shared |= {"min_commit": 4, "mask_token_id": mask, "eos_token_id": eos}
    rules = DecodeRules.of(DecodeKeys(batch_size=spec["prompts"] * spec["generations"], **shared))
    peer_rules = PeerRules(**shared, suppressed_ids=rules.distribution.suppressed_ids)
    noise = RandomMask(mask, seed=1, low=0.3, high=0.8, complementary=True, num_views=2)
    views = rollout_views(dataclasses.replace(recipe, stage="rl"), noise)
    return Setting(prompts, spec["generations"], rules, peer_rules, views)


class Result(NamedTuple):
    timed: dict[str, Timed]  # opponent, main, this; results are those of the updates

    def parts(self, name: str) -> dict[str, float]:
        """Median seconds of the processor over the updates after the first, which warms up."""
        taken = [parts for _, parts in self.timed[name].results[1:]]
        return {part: statistics.median(one[part] for one in taken) for part in PARTS}

    @property
    def differences(self) -> dict[str, float]:
        means = {name: [mean for mean, _ in timed.results] for name, timed in self.timed.items()}
        pairs = {name: zip(values, means["opponent"], strict=True) for name, values in means.items()}
        return {n: max(abs(a - b) / abs(b) for a, b in pair) for n, pair in pairs.items() if n != "opponent"}

    @property
    def is_equal(self) -> bool:
        return max(self.differences.values()) < TOLERANCE


def measure(spec: dict[str, Any], updates: int, checkout: Path | None) -> Result:
    with contextlib.ExitStack() as others:
        ours = OurUpdate(spec)
        calls: dict[str, Any] = {"this": ours}
        if checkout:
            calls["main"] = others.enter_context(Elsewhere("rl", spec, checkout))
        calls["opponent"] = OpponentUpdate(spec, lambda: ours.client.scored)
        timed = interleave(calls, updates)
    return Result({name: timed[name] for name in ("opponent", "main", "this") if name in timed})


def show(result: Result, title: str) -> Table:
    table = Table("CPU seconds an update", *PARTS, "whole update", title=title)
    sums = {}
    for name, timed in result.timed.items():
        parts = result.parts(name)
        sums[name] = timed.cpu_median
        table.add_row(name, *(f"{parts[part]:.3f}" for part in PARTS), f"{sums[name]:.2f}")
    slow = result.parts("opponent")
    for name in sums.keys() - {"opponent"}:
        fast = result.parts(name)
        ratios = [f"{slow[part] / fast[part]:.2f}" if part in ("rollout", "train") else "" for part in PARTS]
        table.add_row(f"opponent / {name}", *ratios, f"{sums['opponent'] / sums[name]:.2f}")
    mean, difference = result.timed["this"].results[-1][0], max(result.differences.values())
    table.caption = f"mean log-probability of a target {mean:.6f}, at most {difference:.0e} apart"
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=256, help="tokens (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=2, help="groups of an update (default: %(default)s)")
    parser.add_argument("--generations", type=int, default=8, help="responses of a group (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=128, help="of a response (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="(default: %(default)s)")
    parser.add_argument("--shape", default="small", choices=SHAPES, help="of the model (default: %(default)s)")
    parser.add_argument("--traces", action="store_true", help="train on the decoder's own steps instead of ELBO views")
    parser.add_argument("--updates", type=int, default=5, help="that are timed (default: %(default)s)")
    parser.add_argument("--main", type=Path, metavar="CHECKOUT", help="also time this checkout, in its own process")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    parser.add_argument("--smoke", action="store_true", help="sizes for tests")
    options = parser.parse_args(arguments)
    if options.smoke:
        vars(options).update(prompt=40, prompts=1, generations=2, new_tokens=32, vocabulary=512, updates=1)

    spec = {n: getattr(options, n) for n in ("prompt", "prompts", "generations", "new_tokens", "vocabulary", "traces")}
    with tempfile.TemporaryDirectory() as folder:
        model_dir = write_model(Path(folder), options.vocabulary, options.shape)
        result = measure(spec | {"model": str(model_dir)}, options.updates, options.main)
    label = (
        f"{options.shape}, V {options.vocabulary}, {options.prompts} x {options.generations} responses of "
        f"{options.new_tokens} to prompts of {options.prompt}, {'traces' if options.traces else 'ELBO views'}"
    )
    Console(width=120, highlight=False).print(show(result, f"{label}, {torch.get_num_threads()} thread(s)"))
    write_rows(options.json, "rl", [row_of(label, result.timed, result.is_equal, result.differences)])
    return 0 if result.is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
