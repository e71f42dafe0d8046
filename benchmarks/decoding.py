"""The cached decoder beside the obvious loop: tokens a second of both in one run, and that the tokens are the same.

    python -m benchmarks.decoding
    python -m benchmarks.decoding --graphs    # on a GPU, in bf16: forwards replayed as CUDA graphs beside launched ones

One prompt of 256 tokens and 512 new ones; then 32 ragged prompts of 40 to 256 tokens in 8 slots, where a finished response
makes room for the next prompt. The obvious loop (tests/decoding/uncached.py) takes one prompt at a time and runs every
forward over the whole prefix, with logits at all positions: on the obvious model (tests/reference.py), and, as `uncached`,
on ours, whose modules are faster. Of the ragged prompts it decodes a sample only, evenly spaced, and its seconds are scaled
to all of them; each of the sample has to be identical.

The model is that of benchmarks.workload with random weights, whose head is wider so that tokens are chosen clearly. Every
forward commits `min_commit` tokens of a block of 32, and no response ends early. Sides take turns; the medians are of
rounds, after one that is not timed.
"""

import argparse
import dataclasses
import functools
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.workload import BLOCK, SHAPES, Timed, interleave, special_ids, text_ids, write_config
from dfactory import distributed
from dfactory.decoding import DecodeRules, decode
from dfactory.decoding.keys import DecodeKeys
from dfactory.models.headers import original_tensors
from dfactory.models.policy import Policy
from dfactory.models.registry import load_policy
from dfactory.types import Rollout
from tests.decoding.uncached import Outcome, Settings, uncached
from tests.reference import ReferenceModel

HEAD = 4.0  # times the drawn weights


def draw_models(vocabulary: int, shape: str, dtype: str = "float32") -> tuple[Policy, ReferenceModel]:
    """Ours and the obvious one, of the same weights. Logits of EOS are 0, far below the largest ones, so that it never
    comes out."""
    with tempfile.TemporaryDirectory() as folder:
        model_dir = write_config(Path(folder), vocabulary, shape)
        policy = load_policy(model_dir, dtype=dtype, init_weights="random")
        config = json.loads((model_dir / "config.json").read_text())
    with torch.no_grad():
        head = policy.model.get_output_embeddings().weight
        head.mul_(HEAD)
        head[special_ids(vocabulary)[1]] = 0
    policy = policy.to(distributed.device())
    tensors = {name: tensor.detach() for name, tensor in original_tensors(policy.model).items()}
    return policy, ReferenceModel(config, tensors)


class Workload(NamedTuple):
    """Prompts, the rules in both forms, and which prompts the obvious loop decodes."""

    name: str
    prompts: list[list[int]]
    rules: DecodeRules
    settings: Settings
    sample: list[int]


def make_workload(name: str, lengths: list[int], sample: int, slots: int, options: argparse.Namespace) -> Workload:
    mask, eos = special_ids(options.vocabulary)
    rng = random.Random(0)
    prompts = [rng.choices(text_ids(options.vocabulary), k=length) for length in lengths]
    shared = {"block_size": BLOCK, "max_new_tokens": options.new_tokens, "threshold": 0.95}
    shared |= {"min_commit": options.min_commit, "mask_token_id": mask, "eos_token_id": eos}
    rules = DecodeRules.of(DecodeKeys(batch_size=slots, **shared))
    settings = Settings(**shared, suppressed_ids=rules.distribution.suppressed_ids)
    step = len(prompts) / min(sample, len(prompts))
    return Workload(name, prompts, rules, settings, [int(i * step) for i in range(min(sample, len(prompts)))])


class Result(NamedTuple):
    workload: Workload
    timed: dict[str, Timed]  # obvious, uncached, cached

    @property
    def scale(self) -> float:
        return len(self.workload.prompts) / len(self.workload.sample)

    def ratio(self, side: str) -> float:
        """Median over rounds of the obvious loop's seconds to those of a side."""
        scale = self.scale if side == "cached" else 1.0
        pairs = zip(self.timed["obvious"].seconds, self.timed[side].seconds, strict=True)
        return statistics.median(slow * scale / fast for slow, fast in pairs)

    def identical(self, side: str) -> int:
        """Of how many prompts of the sample every round of a loop gave the decoder's tokens at the same forwards."""
        rounds = list(zip(self.timed["cached"].results, self.timed[side].results, strict=True))
        return sum(
            all(_same(cached[prompt], obvious[row]) for cached, obvious in rounds)
            for row, prompt in enumerate(self.workload.sample)
        )

    @property
    def is_equal(self) -> bool:
        return all(self.identical(side) == len(self.workload.sample) for side in ("obvious", "uncached"))


def _same(rollout: Rollout, outcome: Outcome) -> bool:
    return rollout.token_ids == outcome.token_ids and rollout.commit_step == outcome.commit_step


def measure(policy: Policy, obvious: ReferenceModel, work: Workload, rounds: int) -> Result:
    def loop(model):
        with policy.device:  # where the loop makes its tensors
            return [uncached(model, work.prompts[i], work.settings) for i in work.sample]

    calls = {
        "obvious": lambda _: loop(obvious),
        "uncached": lambda _: loop(policy),
        "cached": lambda _: decode(policy, work.prompts, work.rules),
    }
    return Result(work, interleave(calls, rounds))


def add_rows(table: Table, result: Result) -> None:
    work = result.workload
    tokens = len(work.prompts) * work.rules.max_new_tokens
    forwards = statistics.mean(rollout.forwards for rollout in result.timed["cached"].results[0])
    sampled = f", {len(work.sample)} of {len(work.prompts)}" if result.scale > 1 else ""
    for name, timed in result.timed.items():
        first, loops = name == "obvious", name != "cached"
        seconds = timed.median * (result.scale if loops else 1.0)
        table.add_row(
            work.name if first else "",
            name + sampled * loops,
            f"{seconds:.2f}",
            f"{tokens / seconds:,.0f}",
            f"{forwards:.0f}",
            "" if first else f"{result.ratio(name):.1f}",
            f"{result.identical(name)} of {len(work.sample)}" if loops else "",
        )


def _decode(policy: Policy, prompts: list[list[int]], rules: DecodeRules, round_: int) -> list[Rollout]:
    return decode(policy, prompts, rules)


def compare_graphs(works: list[Workload], options: argparse.Namespace) -> Table:
    """bf16 rounds otherwise in batches of another shape, so that a few tokens may differ."""
    policy, _ = draw_models(options.vocabulary, options.shape, "bfloat16")
    sides = {"launched": False, "replayed": True}
    table = Table("", "side", "seconds", "tokens a second", "launched / this", "equal tokens", title="bf16")
    for work in works:
        rules = {name: dataclasses.replace(work.rules, cuda_graphs=graphs) for name, graphs in sides.items()}
        calls = {name: functools.partial(_decode, policy, work.prompts, rule) for name, rule in rules.items()}
        timed = interleave(calls, options.rounds)
        tokens = [[token for r in side.results[-1] for token in r.output_ids] for side in timed.values()]
        equal = sum(a == b for a, b in zip(*tokens, strict=True)) / len(tokens[0])
        for name, side in timed.items():
            ratio = timed["launched"].median / side.median
            table.add_row(
                work.name,
                name,
                f"{side.median:.2f}",
                f"{len(tokens[0]) / side.median:,.0f}",
                f"{ratio:.1f}",
                f"{equal:.1%}",
            )
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the one prompt (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=32, help="ragged ones (default: %(default)s)")
    parser.add_argument("--shortest", type=int, default=40, help="ragged prompt (default: %(default)s)")
    parser.add_argument("--slots", type=int, default=8, help="for ragged prompts (default: %(default)s)")
    parser.add_argument("--sample", type=int, default=4, help="that the obvious loop decodes (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=512, help="(default: %(default)s)")
    parser.add_argument("--min-commit", type=int, default=4, help="tokens a forward (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="(default: %(default)s)")
    parser.add_argument("--shape", default="small", choices=SHAPES, help="of the model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="that are timed (default: %(default)s)")
    parser.add_argument("--graphs", action="store_true", help="on a GPU: CUDA graphs beside launched kernels, in bf16")
    parser.add_argument("--smoke", action="store_true", help="sizes for tests")
    options = parser.parse_args(arguments)
    if options.smoke:
        small = {"prompt": 40, "prompts": 4, "slots": 2, "sample": 2, "new_tokens": 64, "vocabulary": 512}
        vars(options).update(small | {"shortest": 8, "min_commit": 16, "rounds": 1})

    rng = random.Random(1)
    ragged = [rng.randint(options.shortest, options.prompt) for _ in range(options.prompts)]
    name = f"{options.prompts} prompts of {options.shortest} to {options.prompt}, {options.slots} slots"
    works = [
        make_workload(f"prompt of {options.prompt}", [options.prompt], 1, 1, options),
        make_workload(name, ragged, options.sample, options.slots, options),
    ]
    if options.graphs and not torch.cuda.is_available():
        parser.error("--graphs replays CUDA graphs: it needs a GPU")
    if options.graphs:
        Console(width=130, highlight=False).print(compare_graphs(works, options))
        return 0
    models = draw_models(options.vocabulary, options.shape)
    results = [measure(*models, work, options.rounds) for work in works]
    columns = ["seconds", "tokens a second", "forwards a response", "obvious / this", "cached is identical"]
    table = Table("", "side", *columns, title=f"{options.new_tokens} new tokens, {torch.get_num_threads()} thread(s)")
    for result in results:
        add_rows(table, result)
    Console(width=130, highlight=False).print(table)
    return 0 if all(result.is_equal for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
