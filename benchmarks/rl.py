"""An update of reinforcement learning, split into rollout, reward, sync and training, beside the obvious one, in one run.

    python -m benchmarks.rl

Ours: groups of sampled responses from the cached decoder, which computes a prompt once a group; rows in which the responses
to a prompt share its clean stream, with a complementary pair of views each; old log-probabilities, one step of the clipped
policy gradient; the weights given to the copy that decodes. The obvious update decodes a response at a time over the whole
prefix (tests/decoding/uncached.py), and runs a noisy ++ clean row of twice the length for every view, once for the old
log-probability and once for the gradient (tests/reference.py). It decodes a sample of the responses only, and its seconds
are scaled to all of them. Both have the same responses to train on, and the mean log-probability of their targets must be
the same.
"""

import argparse
import dataclasses
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.local_client import Weights, copy_weights
from benchmarks.workload import BLOCK, LEARNING_RATE, Obvious, Ours, sft_recipe, special_ids, text_ids, write_model
from dfactory.algorithms.policy_gradient import PolicyGradient
from dfactory.algorithms.rollouts import RolloutViews, rollout_views
from dfactory.decoding import DecodeRules, decode
from dfactory.decoding.keys import DecodeKeys
from dfactory.models.registry import load_policy
from dfactory.noise import RandomMask
from dfactory.rl.rollouts import RolloutBatch, ScoredRollout
from dfactory.rl.rows import rollout_document
from dfactory.rl.source import RolloutSource
from dfactory.types import Rollout
from tests.decoding.uncached import Settings, uncached
from tests.reference import one_view_nll

TOLERANCE = 1e-4  # of the mean log-probability of a target, relative


class Clock:
    """Seconds by part of the update that is running."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)

    def measure(self, part: str, call: Callable):
        started = time.perf_counter()
        outcome = call()
        self.seconds[part] += time.perf_counter() - started
        return outcome


class Setting(NamedTuple):
    prompts: list[list[int]]
    generations: int
    rules: DecodeRules
    settings: Settings
    make_views: RolloutViews


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
        prompts = [prompt for prompt in s.prompts for _ in range(s.generations)]
        noise = [version * len(prompts) + index for index in range(len(prompts))]
        rollouts = self.clock.measure("rollout", lambda: decode(self.actor, prompts, s.rules, noise_ids=noise))
        self.scored = self.clock.measure("reward", lambda: score_groups(rollouts, s.generations))
        return RolloutBatch(self.scored, next_group + len(s.prompts), 0.0, {})


def our_update(side: Ours, source: RolloutSource, clock: Clock) -> float:
    """Seconds go to the clock; returns the mean log-probability of a target before the step."""
    started, before = time.perf_counter(), sum(clock.seconds.values())
    window = source.next_window()
    side.trainer.train_window(window, PolicyGradient())
    elsewhere = sum(clock.seconds.values()) - before
    clock.seconds["train"] += time.perf_counter() - started - elsewhere
    old_N = torch.cat([batch.columns["old_logprob_N"] for batch in window])
    return old_N.mean().item()


def obvious_update(side: Obvious, setting: Setting, scored: list[ScoredRollout], sample: int, clock: Clock) -> float:
    step = len(scored) // sample
    for one in scored[:: step or 1][:sample]:
        scale, started = len(scored) / sample, time.perf_counter()
        rng = random.Random(one.index)
        prompt_ids = one.rollout.prompt_ids
        uncached(side.model, prompt_ids, setting.settings, lambda _, r=rng: [r.random() for _ in range(BLOCK)])
        clock.seconds["rollout"] += (time.perf_counter() - started) * scale
    clock.measure("reward", lambda: score_groups([one.rollout for one in scored], setting.generations))
    return clock.measure("train", lambda: obvious_step(side, setting, scored))


def obvious_step(side: Obvious, setting: Setting, scored: list[ScoredRollout]) -> float:
    """-A w log p of every view, at a ratio of 1, divided by the response's length up to EOS; the old log-probabilities in
    passes of their own."""
    total, targets = 0.0, 0
    for one in scored:
        document, views = setting.make_views(rollout_document(one, BLOCK), one.index)
        clean_1L = torch.from_numpy(document.input_ids_T).long()[None]
        for view in views:
            noisy_1L, target_1L = clean_1L.clone(), torch.zeros_like(clean_1L, dtype=torch.bool)
            noisy_1L[0, view.position_P] = torch.from_numpy(view.input_ids_P).long()
            target_1L[0, view.position_P] = torch.from_numpy(view.target_P)
            with torch.no_grad():
                total -= one_view_nll(side.model, clean_1L, noisy_1L, target_1L, BLOCK).sum().item()
            nll_N = one_view_nll(side.model, clean_1L, noisy_1L, target_1L, BLOCK)
            weight_N = torch.from_numpy(view.elbo_weight_P[view.target_P]).float()
            (one.advantage * weight_N * nll_N).sum().div(len(scored) * document.real_T.sum()).backward()
            targets += len(nll_N)
    torch.nn.utils.clip_grad_norm_(side.parameters, side.recipe.max_grad_norm)
    side.optimiser.step()
    side.optimiser.zero_grad()
    return total / targets


def make_setting(options: argparse.Namespace, recipe) -> Setting:
    mask, eos = special_ids(options.vocabulary)
    rng = random.Random(0)
    prompts = [rng.choices(text_ids(options.vocabulary), k=options.prompt) for _ in range(options.prompts)]
    shared = {"block_size": BLOCK, "max_new_tokens": options.new_tokens, "threshold": 0.95, "temperature": 1.0}
    shared |= {"min_commit": 4, "mask_token_id": mask, "eos_token_id": eos}
    rules = DecodeRules.of(DecodeKeys(batch_size=options.prompts * options.generations, **shared))
    settings = Settings(**shared, suppressed_ids=rules.distribution.suppressed_ids)
    noise = RandomMask(mask, seed=1, low=0.3, high=0.8, complementary=True, num_views=2)
    views = rollout_views(dataclasses.replace(recipe, stage="rl"), noise)
    return Setting(prompts, options.generations, rules, settings, views)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=256, help="tokens (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=2, help="groups of an update (default: %(default)s)")
    parser.add_argument("--generations", type=int, default=8, help="responses of a group (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=128, help="of a response (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="(default: %(default)s)")
    parser.add_argument(
        "--sample", type=int, default=2, help="responses that the obvious one decodes (default: %(default)s)"
    )
    parser.add_argument("--updates", type=int, default=3, help="that are timed (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="sizes for tests")
    options = parser.parse_args(arguments)
    if options.smoke:
        vars(options).update(prompt=40, prompts=1, generations=2, new_tokens=32, vocabulary=512, sample=1, updates=1)

    with tempfile.TemporaryDirectory() as folder:
        model_dir = write_model(Path(folder), options.vocabulary)
        recipe = dataclasses.replace(sft_recipe(model_dir, Path(folder), options.vocabulary), policy_loss="ebpo")
        recipe = dataclasses.replace(recipe, learning_rate=LEARNING_RATE)
        setting = make_setting(options, recipe)
        clocks = {"obvious": Clock(), "this": Clock()}
        ours, obvious, client = Ours(recipe), Obvious(recipe), TimedClient(model_dir, setting, clocks["this"])
        longest = (options.prompt + 3 * options.new_tokens + 2 * BLOCK) // BLOCK * BLOCK
        source = RolloutSource(
            *(client, ours.trainer.weights, ours.trainer.score, setting.make_views),
            **{
                "block_size": BLOCK,
                "row_length": max(2048, longest),
                "rank": 0,
                "world_size": 1,
                "micro_batch_rows": 1,
            },
        )
        means, rounds = [], 1 + options.updates
        for number in range(rounds):
            if number == 1:  # the first one warms up
                for clock in clocks.values():
                    clock.seconds.clear()
            mean = our_update(ours, source, clocks["this"])
            reference = obvious_update(obvious, setting, client.scored, options.sample, clocks["obvious"])
            means.append((mean, reference))

    parts = ("rollout", "reward", "sync", "train")
    title = (
        f"{options.prompts} x {options.generations} responses of {options.new_tokens} to prompts of {options.prompt}"
    )
    table = Table("seconds an update", *parts, "rollout + train", title=f"{title}, {torch.get_num_threads()} thread(s)")
    sums = {}
    for name, clock in clocks.items():
        seconds = {part: clock.seconds[part] / options.updates for part in parts}
        sums[name] = seconds["rollout"] + seconds["train"]
        table.add_row(name, *(f"{seconds[part]:.3f}" for part in parts), f"{sums[name]:.2f}")
    ratios = [clocks["obvious"].seconds[part] / clocks["this"].seconds[part] for part in ("rollout", "train")]
    table.add_row("ratio", f"{ratios[0]:.1f}", "", "", f"{ratios[1]:.1f}", f"{sums['obvious'] / sums['this']:.1f}")
    difference = max(abs(a - b) / abs(b) for a, b in means)
    table.caption = f"mean log-probability of a target {means[-1][0]:.6f}, at most {difference:.0e} apart"
    Console(width=110, highlight=False).print(table)
    return 0 if difference < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
