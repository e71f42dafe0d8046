"""Packed rows beside the opponent's, sorted by length and padded: how full they are, and tokens a second.

    python -m benchmarks.packing
    python -m benchmarks.packing --main ../dFactory    # and the same steps by another checkout

512 records whose prompt and response lengths are drawn from the lognormal that fits those of the quickstart's records (in
tokens, the two correlated as there), times 16: records of about 400 tokens. All of them are packed into rows of 4,096 with
a complementary pair of views in blocks of 32, and the share of row positions that hold a token is counted. Then the first
micro-batches are trained on by both sides in turns: packed rows by our step, and the same documents with the same views by
the opponent's (see benchmarks.step), a view a row. Its rows are sorted by length and cut into micro-batches with at most a
tenth of padding; their gradients are summed. Tokens are those of the documents themselves: neither views nor fill count.
"""

import argparse
import contextlib
import functools
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import Elsewhere, Timed, interleave, largest_difference, row_of, write_rows
from benchmarks.opponent_training import NoisyRow, micro_batches
from benchmarks.step import FP32_TOLERANCE
from benchmarks.workload import BLOCK, Lengths, Opponent, Ours, Records, sft_recipe, write_model, write_records
from dfactory.assembly import read_inputs
from dfactory.recipe import load_recipe

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart" / "sft.yaml"


def draw_lengths(count: int, factor: float, longest: int, seed: int = 0) -> list[Lengths]:
    """The fit takes logarithms of both lengths and their covariance. A record above `longest` is drawn again."""
    examples = read_inputs(load_recipe(QUICKSTART, [])).train
    response_E = np.array([example.trainable_T.sum() for example in examples])
    log_2E = np.log([examples.length_E - response_E, response_E])
    rng = np.random.default_rng(seed)
    drawn = []
    while len(drawn) < count:
        prompt, response = rng.multivariate_normal(log_2E.mean(axis=1), np.cov(log_2E))
        lengths = Lengths(max(1, round(factor * np.exp(prompt))), max(1, round(factor * np.exp(response))))
        if sum(lengths) <= longest:
            drawn.append(lengths)
    return drawn


def fullness(records: Records) -> tuple[int, float, float]:
    """Rows of an epoch, the share of their positions that hold a token, and that without the fill to whole blocks."""
    rows, filled, fill = 0, 0, 0
    while (window := records.source.next_window()) is not None:
        (batch,) = window
        rows += len(batch.input_ids_RS)
        filled += batch.num_tokens
        length_D = torch.tensor([len(records.example(name)) for name in batch.document_id_D.tolist()])
        is_fill_RS = batch.position_ids_RS >= length_D[batch.document_RS.clamp(min=0)]
        fill += int((is_fill_RS & (batch.document_RS >= 0)).sum())
    positions = rows * records.recipe.row_length
    return rows, filled / positions, (filled - fill) / positions


class Result(NamedTuple):
    timed: dict[str, Timed]
    documents: float  # of a batch
    tokens: list[int]  # of the documents of each
    padded: float  # share of the opponent's positions that hold a token

    def ratios(self, side: str) -> list[float]:
        pairs = zip(self.timed["opponent"].cpu, self.timed[side].cpu, strict=True)
        return [slow / fast for slow, fast in pairs]

    @property
    def differences(self) -> dict[str, float]:
        losses = self.timed["opponent"].results
        return {n: largest_difference(t.results, losses) for n, t in self.timed.items() if n != "opponent"}

    def speed(self, name: str) -> float:
        """Tokens a second, the median batch."""
        return statistics.median(n / seconds for n, seconds in zip(self.tokens, self.timed[name].seconds, strict=True))


def side(spec: dict[str, Any]) -> Callable[[int], float]:
    """A step of the opponent or ours on the batch of each round."""
    recipe = sft_recipe(Path(spec["model"]), Path(spec["records"]), spec["vocabulary"], **spec["keys"])
    records = Records(recipe)
    batches = [records.source.next_window()[0] for _ in range(spec["steps"])]
    kind = Opponent if spec["name"] == "opponent" else Ours
    windows = [(batch, records.noisy_rows(batch) if kind is Opponent else []) for batch in batches]
    made = kind(recipe)
    return lambda number: made.step(*windows[number])


def share_of_tokens(rows: list[NoisyRow]) -> float:
    """In the opponent's micro-batches."""
    lengths = [[len(rows[i].clean_L) for i in batch] for batch in micro_batches(rows)]
    return sum(map(sum, lengths)) / sum(max(batch) * len(batch) for batch in lengths)


def train_all(spec: dict[str, Any], records: Records, count: int, main: Path | None) -> Result:
    """Time `count` micro-batches, after one that is not timed."""
    batches = [records.source.next_window()[0] for _ in range(count + 1)][1:]
    spec = spec | {"steps": count + 1}
    with contextlib.ExitStack() as others:
        calls: dict[str, Any] = {"opponent": side(spec | {"name": "opponent"})}
        if main:
            calls["main"] = others.enter_context(Elsewhere("packing", spec | {"name": "main"}, main))
        calls["packed"] = side(spec | {"name": "packed"})
        timed = interleave(calls, count)
    documents = statistics.mean(len(batch.document_id_D) for batch in batches)
    full = statistics.mean(share_of_tokens(records.noisy_rows(batch)) for batch in batches)
    return Result(timed, documents, [records.real_tokens(batch) for batch in batches], full)


def show(console: Console, result: Result) -> None:
    table = Table("", "documents a batch", "tokens a second", "s a batch", "CPU s", "opponent / this, CPU", "last loss")
    for name, timed in result.timed.items():
        ratios = result.ratios(name)
        shown = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        times = [f"{timed.median:.2f}", f"{timed.cpu_median:.2f}", "" if name == "opponent" else shown]
        table.add_row(name, f"{result.documents:.1f}", f"{result.speed(name):,.0f}", *times, f"{timed.results[-1]:.6f}")
    console.print(table)
    console.print(
        f"the opponent's sorted rows hold {result.padded:.1%} tokens and fill; largest difference of losses "
        f"{max(result.differences.values()):.1e}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=512, help="(default: %(default)s)")
    parser.add_argument("--factor", type=float, default=16.0, help="of the bundled lengths (default: %(default)s)")
    parser.add_argument("--row-length", type=int, default=4096, help="(default: %(default)s)")
    parser.add_argument("--rows", type=int, default=2, help="of a micro-batch (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="(default: %(default)s)")
    parser.add_argument("--batches", type=int, default=5, help="that are timed (default: %(default)s)")
    parser.add_argument("--main", type=Path, metavar="CHECKOUT", help="also time this checkout, in its own process")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    parser.add_argument("--smoke", action="store_true", help="sizes for tests")
    options = parser.parse_args(arguments)
    if options.smoke:
        small = {"records": 48, "factor": 2.0, "row_length": 512, "rows": 1, "vocabulary": 512, "batches": 1}
        vars(options).update(small)

    console = Console(width=120, highlight=False)
    longest = options.row_length // 3 // BLOCK * BLOCK  # with two views
    with tempfile.TemporaryDirectory() as folder:
        model_dir = write_model(Path(folder), options.vocabulary)
        lengths = draw_lengths(options.records, options.factor, longest)
        file = write_records(Path(folder) / "records.jsonl", lengths, options.vocabulary)
        keys = {"max_length": longest, "row_length": options.row_length}
        recipe = functools.partial(sft_recipe, model_dir, file, options.vocabulary, **keys)
        rows, share, without_fill = fullness(Records(recipe()))
        total, responses = np.array(lengths).sum(axis=1), np.array(lengths)[:, 1]
        console.print(
            f"{len(lengths)} records of {total.min()} to {total.max()} tokens, mean {total.mean():.0f}, responses "
            f"{responses.mean():.0f}; {rows} packed rows: {share:.1%} of positions hold a token, {without_fill:.1%} "
            f"without EOS fill; {torch.get_num_threads()} thread(s)"
        )
        keys |= {"per_device_train_batch_size": options.rows}
        spec = {"model": str(model_dir), "records": str(file), "vocabulary": options.vocabulary, "keys": keys}
        timed_records = Records(recipe(per_device_train_batch_size=options.rows))
        result = train_all(spec, timed_records, options.batches, options.main)
    show(console, result)
    equal = max(result.differences.values()) < FP32_TOLERANCE
    label = f"{options.records} records, mean {total.mean():.0f} tokens, rows of {options.row_length}"
    write_rows(options.json, "packing", [row_of(label, result.timed, equal, result.differences)])
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
