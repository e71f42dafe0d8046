"""The ELBO of responses by N views, of a policy and its reference, beside separate passes: seconds and values in one run.

    python -m benchmarks.likelihood

Ours packs a response's N views after one clean stream and scores them in one forward per model. The opponent
(benchmarks/opponent.py) runs a noisy ++ clean row of twice the length for every view and model. Both see the same noise and
compute without gradients, as the reference of DPO, the old policy of RL and `dfactory eval` do. Both models have the same
weights, so two models change the seconds and not the values.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import interleave, largest_difference
from benchmarks.opponent_training import NoisyRow
from benchmarks.workload import (
    Lengths,
    Opponent,
    Ours,
    Records,
    sft_recipe,
    write_model,
    write_records,
)
from dfactory.algorithms.elbo import elbo
from dfactory.types import ViewBatch

MODELS = ("policy", "reference")
TOLERANCE = 1e-4  # of an ELBO, relative


@torch.no_grad()
def packed(sides: dict[str, Ours], batch: ViewBatch) -> list[float]:
    for side in sides.values():
        elbo_D = elbo(batch, side.trainer.policy(batch).logprob_N)
    return elbo_D.tolist()


def separate(sides: dict[str, Opponent], rows: list[NoisyRow], documents: int) -> list[float]:
    """Rows stand document by document; factors are ELBO weights, divided by the number of views."""
    for side in sides.values():
        nll_R = side.training.sums(rows)
    return (-nll_R.view(documents, -1).sum(1)).tolist()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=256, help="tokens (default: %(default)s)")
    parser.add_argument("--response", type=int, default=256, help="tokens (default: %(default)s)")
    parser.add_argument("--views", type=int, default=8, help="N (default: %(default)s)")
    parser.add_argument("--documents", type=int, default=1, help="in a batch (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="that are timed (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="sizes for tests")
    options = parser.parse_args(arguments)
    if options.smoke:
        vars(options).update(prompt=40, response=56, views=4, vocabulary=512, rounds=1, documents=2)

    with tempfile.TemporaryDirectory() as folder:
        model_dir = write_model(Path(folder), options.vocabulary)
        lengths = [Lengths(options.prompt, options.response)] * options.documents
        file = write_records(Path(folder) / "records.jsonl", lengths, options.vocabulary)
        keys = {"max_length": options.prompt + options.response, "packing": False, "complementary": False}
        keys |= {"num_views": options.views, "per_device_train_batch_size": options.documents}
        recipe = sft_recipe(model_dir, file, options.vocabulary, **keys)
        records = Records(recipe)
        (batch,) = records.source.next_window()
        rows = records.noisy_rows(batch, elbo=True)
        ours, opponent = ({name: kind(recipe) for name in MODELS} for kind in (Ours, Opponent))
        calls = {
            f"{options.views} x 2 passes over 2L": lambda _: separate(opponent, rows, options.documents),
            f"2 passes, {options.views} views": lambda _: packed(ours, batch),
        }
        slow, fast = interleave(calls, options.rounds).items()

    difference = largest_difference(fast[1].results[0], slow[1].results[0])
    ratios = [a / b for a, b in zip(slow[1].seconds, fast[1].seconds, strict=True)]
    title = f"ELBO of {options.documents} response(s) of {options.response} tokens to {options.prompt}"
    table = Table("", "seconds", "ELBO, nats", title=f"{title}, {torch.get_num_threads()} thread(s)")
    for name, timed in (slow, fast):
        table.add_row(name, f"{timed.median:.3f}", f"{timed.results[0][0]:.4f}")
    spread = f"{min(ratios):.1f} to {max(ratios):.1f}"
    table.caption = f"{statistics.median(ratios):.1f} times as fast ({spread}); {difference:.0e} apart"
    Console(width=110, highlight=False).print(table)
    return 0 if difference < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
