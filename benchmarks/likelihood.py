"""The ELBO of responses by N views, of a policy and its reference, beside separate passes: seconds and values in one run.

    python -m benchmarks.likelihood

Ours packs a response's N views after one clean stream and scores them in one forward per model. The obvious version
(tests/reference.py) runs a noisy ++ clean row of twice the length for every view and model, with a dense float mask and
logits at all positions. Both see the same noise and compute without gradients, as the reference of DPO, the old policy of RL
and `dfactory eval` do. Both models have the same weights, so two models change the seconds and not the values.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.workload import (
    BLOCK,
    Documents,
    Lengths,
    Obvious,
    Ours,
    Records,
    interleave,
    largest_difference,
    sft_recipe,
    write_model,
    write_records,
)
from dfactory.algorithms.elbo import elbo
from dfactory.types import ViewBatch
from tests.reference import one_view_nll

MODELS = ("policy", "reference")
TOLERANCE = 1e-4  # of an ELBO, relative


@torch.no_grad()
def packed(sides: dict[str, Ours], batch: ViewBatch) -> list[float]:
    for side in sides.values():
        elbo_D = elbo(batch, side.trainer.policy(batch).logprob_N)
    return elbo_D.tolist()


@torch.no_grad()
def separate(sides: dict[str, Obvious], batch: ViewBatch, documents: Documents) -> list[float]:
    """Weights are those of the batch's targets, which stand document by document and view by view."""
    for side in sides.values():
        total_D = torch.zeros(len(documents.clean_DL))
        for k, (noisy_DL, target_DL) in enumerate(zip(documents.noisy_KDL, documents.target_KDL, strict=True), start=1):
            nll_N = one_view_nll(side.model, documents.clean_DL, noisy_DL, target_DL, BLOCK)
            document_N = target_DL.nonzero()[:, 0]
            here_N = batch.view_N == k
            weight_N = batch.elbo_weight_N[here_N][batch.document_N[here_N].argsort(stable=True)]
            total_D = total_D.index_add(0, document_N, -weight_N * nll_N)
    return (total_D / len(documents.noisy_KDL)).tolist()


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
        documents = records.padded(batch)
        ours, obvious = ({name: kind(recipe) for name in MODELS} for kind in (Ours, Obvious))
        calls = {
            f"{options.views} x 2 passes over 2L": lambda _: separate(obvious, batch, documents),
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
