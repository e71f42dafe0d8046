"""The decoder beside the opponent's cached loop: tokens a second of both in one run, and that the tokens are the same.

    python -m benchmarks.decoding
    python -m benchmarks.decoding --main ../dFactory    # and the same prompts by another checkout
    python -m benchmarks.decoding --compiled    # and by decode.compile
    python -m benchmarks.decoding --graphs    # on a GPU, in bf16: forwards replayed as CUDA graphs beside launched ones

One prompt of 256 tokens and 512 new ones; then 32 ragged prompts of 40 to 256 tokens in 8 slots, where a finished response
makes room for the next prompt. The opponent (benchmarks/opponent_decoding.py) keeps a cache of blocks and computes each
finished block once more to fill it; ragged prompts it decodes in batches of 8, sorted by length. tests/test_opponent.py
holds its tokens to the uncached loop, and here both must give the same tokens at the same forwards.

The model is that of benchmarks.workload with random weights, whose head is wider so that tokens are chosen clearly. Every
forward commits `min_commit` tokens of a block of 32, and no response ends early. Sides take turns; the medians are of
rounds, after one that is not timed.
"""

import argparse
import contextlib
import dataclasses
import functools
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import Elsewhere, Timed, interleave, row_of, write_rows
from benchmarks.opponent import Peer
from benchmarks.opponent_decoding import PeerRules, decode_in_batches
from benchmarks.workload import BLOCK, SHAPES, choose_clearly, special_ids, text_ids, write_config
from dfactory import distributed
from dfactory.decoding import DecodeRules, decode
from dfactory.decoding.keys import DecodeKeys
from dfactory.models.policy import Policy
from dfactory.models.registry import load_policy
from dfactory.models.saving import save_policy
from dfactory.types import Rollout


def draw_model(vocabulary: int, shape: str, folder: Path, dtype: str = "float32") -> Policy:
    """With a head that chooses clearly, and never EOS."""
    policy = load_policy(write_config(folder, vocabulary, shape), dtype=dtype, init_weights="random")
    choose_clearly(policy, vocabulary)
    return policy.to(distributed.device())


class Workload(NamedTuple):
    """Prompts and the rule in both forms."""

    name: str
    prompts: list[list[int]]
    rules: DecodeRules
    peer_rules: PeerRules
    slots: int


def make_workload(name: str, lengths: list[int], slots: int, spec: dict[str, Any]) -> Workload:
    mask, eos = special_ids(spec["vocabulary"])
    rng = random.Random(0)
    prompts = [rng.choices(text_ids(spec["vocabulary"]), k=length) for length in lengths]
    shared = {"block_size": BLOCK, "max_new_tokens": spec["new_tokens"], "threshold": 0.95}
    shared |= {"min_commit": spec["min_commit"], "mask_token_id": mask, "eos_token_id": eos}
    rules = DecodeRules.of(DecodeKeys(batch_size=slots, **shared))
    return Workload(name, prompts, rules, PeerRules(**shared, suppressed_ids=rules.distribution.suppressed_ids), slots)


def workloads(spec: dict[str, Any]) -> list[Workload]:
    rng = random.Random(1)
    ragged = [rng.randint(spec["shortest"], spec["prompt"]) for _ in range(spec["prompts"])]
    name = f"{spec['prompts']} prompts of {spec['shortest']} to {spec['prompt']}, {spec['slots']} slots"
    return [
        make_workload(f"prompt of {spec['prompt']}", [spec["prompt"]], 1, spec),
        make_workload(name, ragged, spec["slots"], spec),
    ]


def side(spec: dict[str, Any]) -> Callable[[int], list[list[list[int]]]]:
    """Tokens and commit steps of each prompt of a workload, by the side that `spec` names."""
    work = workloads(spec)[spec["workload"]]
    if spec["name"] == "opponent":
        peer = Peer(spec["model"])
        return lambda _: [list(a) for a in decode_in_batches(peer, work.prompts, work.peer_rules, work.slots)]
    policy = load_policy(spec["model"], dtype="float32").to(distributed.device())
    compiled = spec["name"] == "compiled"  # an earlier checkout has no such key
    rules = dataclasses.replace(work.rules, compile=True) if compiled else work.rules
    return lambda _: [[r.token_ids, r.commit_step] for r in decode(policy, work.prompts, rules)]


class Result(NamedTuple):
    workload: Workload
    timed: dict[str, Timed]  # opponent, main, cached, compiled

    def ratios(self, name: str) -> list[float]:
        """Of the seconds of the processor, round by round."""
        return [slow / fast for slow, fast in zip(self.timed["opponent"].cpu, self.timed[name].cpu, strict=True)]

    def identical(self, name: str) -> int:
        """Of how many prompts every round of a side gave the opponent's tokens at the same forwards."""
        rounds = list(zip(self.timed["opponent"].results, self.timed[name].results, strict=True))
        return sum(all(a[i] == b[i] for a, b in rounds) for i in range(len(self.workload.prompts)))

    @property
    def differences(self) -> dict[str, float]:
        """The share of prompts whose tokens differ."""
        prompts = len(self.workload.prompts)
        return {name: 1 - self.identical(name) / prompts for name in self.timed if name != "opponent"}

    @property
    def is_equal(self) -> bool:
        return not any(self.differences.values())


def measure(number: int, spec: dict[str, Any], rounds: int, main: Path | None, compiled: bool = False) -> Result:
    spec = spec | {"workload": number}
    with contextlib.ExitStack() as others:
        calls: dict[str, Any] = {"opponent": side(spec | {"name": "opponent"})}
        if main:
            calls["main"] = others.enter_context(Elsewhere("decoding", spec | {"name": "main"}, main))
        names = ("cached", "compiled") if compiled else ("cached",)
        calls |= {name: side(spec | {"name": name}) for name in names}
        return Result(workloads(spec)[number], interleave(calls, rounds))


def add_rows(table: Table, result: Result) -> None:
    work = result.workload
    tokens = len(work.prompts) * work.rules.max_new_tokens
    for name, timed in result.timed.items():
        first, ratios = name == "opponent", result.ratios(name)
        table.add_row(
            work.name if first else "",
            name,
            f"{timed.median:.2f}",
            f"{timed.cpu_median:.2f}",
            f"{tokens / timed.median:,.0f}",
            "" if first else f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            "" if first else f"{result.identical(name)} of {len(work.prompts)}",
        )


def _decode(policy: Policy, prompts: list[list[int]], rules: DecodeRules, round_: int) -> list[Rollout]:
    return decode(policy, prompts, rules)


def compare_graphs(works: list[Workload], options: argparse.Namespace) -> Table:
    """bf16 rounds otherwise in batches of another shape, so that a few tokens may differ."""
    with tempfile.TemporaryDirectory() as folder:
        policy = draw_model(options.vocabulary, options.shape, Path(folder), "bfloat16")
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
    parser.add_argument("--new-tokens", type=int, default=512, help="(default: %(default)s)")
    parser.add_argument("--min-commit", type=int, default=4, help="tokens a forward (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="(default: %(default)s)")
    parser.add_argument("--shape", default="small", choices=SHAPES, help="of the model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="that are timed (default: %(default)s)")
    parser.add_argument("--main", type=Path, metavar="CHECKOUT", help="also time this checkout, in its own process")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    parser.add_argument("--only", type=int, choices=(0, 1), help="0: the one prompt, 1: the ragged ones; default: both")
    parser.add_argument("--compiled", action="store_true", help="also with decode.compile")
    parser.add_argument("--graphs", action="store_true", help="on a GPU: CUDA graphs beside launched kernels, in bf16")
    parser.add_argument("--smoke", action="store_true", help="sizes for tests")
    options = parser.parse_args(arguments)
    if options.smoke:
        small = {"prompt": 40, "prompts": 4, "slots": 2, "new_tokens": 64, "vocabulary": 512}
        vars(options).update(small | {"shortest": 8, "min_commit": 16, "rounds": 1})

    names = ("prompt", "prompts", "shortest", "slots", "new_tokens", "min_commit", "vocabulary")
    spec = {name: getattr(options, name) for name in names}
    if options.graphs and not torch.cuda.is_available():
        parser.error("--graphs replays CUDA graphs: it needs a GPU")
    if options.graphs:
        Console(width=130, highlight=False).print(compare_graphs(workloads(spec), options))
        return 0
    chosen = (0, 1) if options.only is None else (options.only,)
    with tempfile.TemporaryDirectory() as folder:
        model_dir = Path(folder) / "model"
        model_dir.mkdir()
        save_policy(draw_model(options.vocabulary, options.shape, Path(folder) / "drawn"), model_dir)
        spec |= {"model": str(model_dir)}
        results = [measure(n, spec, options.rounds, options.main, options.compiled) for n in chosen]
    columns = ["seconds", "CPU s", "tokens a second", "opponent / this, CPU", "tokens are the opponent's"]
    title = f"{options.shape}, {options.new_tokens} new tokens, {torch.get_num_threads()} thread(s)"
    table, rows = Table("", "side", *columns, title=title), []
    for result in results:
        add_rows(table, result)
        label = f"{options.shape}, V {options.vocabulary}, {result.workload.name}, {options.new_tokens} new"
        rows.append(row_of(label, result.timed, result.is_equal, result.differences))
    Console(width=130, highlight=False).print(table)
    write_rows(options.json, "decoding", rows)
    return 0 if all(result.is_equal for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
