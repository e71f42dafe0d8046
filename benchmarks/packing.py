"""Packed rows beside rows padded to the longest document of the batch: how full they are, and tokens a second.

    python -m benchmarks.packing

512 records whose prompt and response lengths are drawn from the lognormal that fits those of the quickstart's records (in
tokens, the two correlated as there), times 16: records of about 400 tokens. All of them are packed into rows of 4,096 with
a complementary pair of views in blocks of 32, and the share of row positions that hold a token is counted. Then the first
micro-batches are trained on by both sides in turns: packed rows by our step, and the same documents with the same views by
the obvious step (see benchmarks.step), one a row, padded to the longest. Tokens are those of the documents themselves:
neither views nor fill count.
"""

import argparse
import functools
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.step import FP32_TOLERANCE
from benchmarks.workload import (
    BLOCK,
    Lengths,
    Obvious,
    Ours,
    Records,
    Timed,
    interleave,
    largest_difference,
    sft_recipe,
    write_model,
    write_records,
)
from dfactory.assembly import read_inputs
from dfactory.recipe import Recipe, load_recipe
from dfactory.types import ViewBatch

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
    batches: list[ViewBatch]  # those timed
    tokens: list[int]  # of the documents of each
    padded: int  # positions of their padded clean rows

    @property
    def ratios(self) -> list[float]:
        return [
            slow / fast for slow, fast in zip(self.timed["obvious"].seconds, self.timed["packed"].seconds, strict=True)
        ]

    @property
    def difference(self) -> float:
        return largest_difference(self.timed["packed"].results, self.timed["obvious"].results)

    def speed(self, name: str) -> float:
        """Tokens a second, the median batch."""
        return statistics.median(n / seconds for n, seconds in zip(self.tokens, self.timed[name].seconds, strict=True))


def train_both(recipe: Recipe, count: int) -> Result:
    """Time `count` micro-batches, after one that is not timed."""
    records = Records(recipe)
    batches = [records.source.next_window()[0] for _ in range(count + 1)]
    given = [(batch, records.padded(batch)) for batch in batches]
    sides = {"obvious": Obvious(recipe), "packed": Ours(recipe)}
    calls = {name: lambda number, side=side: side.step(*given[number]) for name, side in sides.items()}
    timed = interleave(calls, count)
    tokens = [records.real_tokens(batch) for batch in batches[1:]]
    return Result(timed, batches[1:], tokens, sum(documents.clean_DL.numel() for _, documents in given[1:]))


def show(console: Console, result: Result) -> None:
    table = Table("", "documents a batch", "tokens a second", "s a batch", "first loss", "last loss")
    documents = statistics.mean(len(batch.document_id_D) for batch in result.batches)
    for name, side in result.timed.items():
        losses = [f"{side.results[0]:.6f}", f"{side.results[-1]:.6f}"]
        table.add_row(name, f"{documents:.1f}", f"{result.speed(name):,.0f}", f"{side.median:.2f}", *losses)
    console.print(table)
    console.print(
        f"packed / obvious {statistics.median(result.ratios):.1f} (median of {len(result.ratios)} batches, "
        f"{min(result.ratios):.1f} to {max(result.ratios):.1f}); padded clean rows hold "
        f"{sum(result.tokens) / result.padded:.1%} tokens; largest difference of losses {result.difference:.1e}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=512, help="(default: %(default)s)")
    parser.add_argument("--factor", type=float, default=16.0, help="of the bundled lengths (default: %(default)s)")
    parser.add_argument("--row-length", type=int, default=4096, help="(default: %(default)s)")
    parser.add_argument("--rows", type=int, default=2, help="of a micro-batch (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="(default: %(default)s)")
    parser.add_argument("--batches", type=int, default=5, help="that are timed (default: %(default)s)")
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
        result = train_both(recipe(per_device_train_batch_size=options.rows), options.batches)
    show(console, result)
    return 0 if result.difference < FP32_TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
