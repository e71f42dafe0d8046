"""How far shared noise and pairs of views cut the variance of a DPO margin, at equal forwards.

    python -m benchmarks.dpo_variance --policy runs/quickstart_dpo --reference runs/quickstart \
        --data recipes/quickstart/data/pairs_heldout.jsonl

The margin of a pair, (elbo_policy - elbo_reference) of the chosen answer less that of the rejected one, is estimated many
times with fresh noise. Every estimator scores as many views of every answer by both models, and each is unbiased for the
same value, the ELBO over all mask ratios:

    naive      each of the four ELBOs from its own noise, masks drawn one by one at t uniform
    shared     policy and reference, chosen and rejected get the same noise
    pairs      half of the views are the complements of the others
    exact      the number of masks is drawn, not each mask; weights are bounded
    slices     the n-th of the views draws from the n-th slice of [0, 1]

Prints the mean, its standard error, the variance of an estimate (mean over the records), and how many times smaller it is.
"""

import argparse
import sys
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from dfactory.algorithms.elbo import elbo
from dfactory.config.data import DatasetKeys
from dfactory.data.chat import ChatEncoder, special_ids
from dfactory.data.examples import load_examples
from dfactory.models.hub import resolve
from dfactory.models.policy import Policy
from dfactory.models.registry import load_policy, read_tokenizer, trained_block_size
from dfactory.noise import RandomMask
from dfactory.packing import PackedDocument, align, collate
from dfactory.types import AlignedDocument

SHORTEST, LONGEST = 0.001, 0.999  # mask ratios where masks are drawn one by one: 1/t has no bound at 0


def read_pairs(
    model: str, data: str, count: int, block_size: int, max_length: int
) -> tuple[list[AlignedDocument], int]:
    """The documents of the first pairs, chosen and rejected in turn, and the mask id."""
    directory = resolve(model)
    tokenizer = read_tokenizer(directory)
    special = special_ids(tokenizer)
    examples = load_examples(
        [DatasetKeys(data)],
        ChatEncoder(tokenizer, None, special),
        max_length=max_length,
        overlong="refuse",
        on_bad_row="skip",
        max_bad_fraction=1.0,
        block_size=block_size,
        eos_id=special.eos,
        vocab_size=len(tokenizer),
        paired=True,
    )
    return [
        align(examples[index], block_size, special.eos) for index in range(2 * min(count, len(examples) // 2))
    ], special.mask


@torch.no_grad()
def estimates(policy: Policy, documents: list[AlignedDocument], make: RandomMask, replicates: int) -> torch.Tensor:
    """ELBO estimates [replicates, D], one for each visit."""
    rows = []
    for visit in range(replicates):
        batch = collate(
            [[PackedDocument(document, make(document, visit))] for document in documents], documents[0].block_size
        )
        rows.append(elbo(batch, policy.score(batch).logprob_N.cpu()))
    return torch.stack(rows)


def margins(
    policy: Policy, reference: Policy, documents: list[AlignedDocument], makers: list[RandomMask], replicates: int
):
    """Margins [replicates, pairs]; one maker for all four ELBOs of a pair, or one for each."""
    if len(makers) == 1:
        score_RD = estimates(policy, documents, makers[0], replicates) - estimates(
            reference, documents, makers[0], replicates
        )
        return score_RD[:, 0::2] - score_RD[:, 1::2]
    terms = [(policy, 0), (reference, 0), (policy, 1), (reference, 1)]
    a, b, c, d = (
        estimates(model, documents[side::2], make, replicates)
        for (model, side), make in zip(terms, makers, strict=True)
    )
    return (a - b) - (c - d)


def estimators(mask_id: int, views: int) -> dict[str, list[RandomMask]]:
    def maker(seed: int = 0, **options) -> RandomMask:
        span = {"low": 0.0, "high": 1.0} if options.get("mask_count") == "exact" else {"low": SHORTEST, "high": LONGEST}
        count = views // 2 if options.get("complementary") else views
        return RandomMask(mask_id, seed, **span, num_views=count, **options)

    pair, exact = {"complementary": True}, {"mask_count": "exact"}
    return {
        "naive": [maker(seed) for seed in range(4)],
        "shared": [maker()],
        "shared, pairs": [maker(**pair)],
        "shared, exact": [maker(**exact)],
        "shared, exact, pairs": [maker(**exact, **pair)],
        "shared, exact, pairs, slices": [maker(**exact, **pair, stratified=True)],
    }


class Result(NamedTuple):
    mean: float
    standard_error: float
    variance: float  # of one estimate, mean over the pairs


def compare(
    policy: Policy, reference: Policy, documents: list[AlignedDocument], mask_id: int, views: int, replicates: int
) -> dict[str, Result]:
    results = {}
    for name, makers in estimators(mask_id, views).items():
        margin_RP = margins(policy, reference, documents, makers, replicates)
        variance_P = margin_RP.var(dim=0)
        error = (variance_P.sum() / replicates).sqrt() / len(variance_P)
        results[name] = Result(margin_RP.mean().item(), error.item(), variance_P.mean().item())
    return results


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", required=True, help="model directory or run folder after DPO")
    parser.add_argument("--reference", required=True, help="the one before")
    parser.add_argument("--data", required=True, help="JSONL of preference pairs")
    parser.add_argument("--pairs", type=int, default=24, help="records (default: %(default)s)")
    parser.add_argument("--replicates", type=int, default=48, help="estimates of each margin (default: %(default)s)")
    parser.add_argument("--views", type=int, default=4, help="views of each answer, even (default: %(default)s)")
    parser.add_argument(
        "--max-length", type=int, default=256, help="longer documents are left out (default: %(default)s)"
    )
    options = parser.parse_args(arguments)

    policy, reference = (load_policy(path, dtype="float32") for path in (options.policy, options.reference))
    block_size = trained_block_size(resolve(options.policy))
    documents, mask_id = read_pairs(options.policy, options.data, options.pairs, block_size, options.max_length)
    results = compare(policy, reference, documents, mask_id, options.views, options.replicates)
    table = Table("estimator", "mean margin", "standard error", "variance", "naive / this")
    for name, found in results.items():
        ratio = results["naive"].variance / found.variance
        table.add_row(name, f"{found.mean:.3f}", f"{found.standard_error:.3f}", f"{found.variance:.4g}", f"{ratio:.1f}")
    console = Console(width=100)
    console.print(
        f"{len(documents) // 2} pairs, {options.replicates} estimates of each, {options.views} views of every answer"
    )
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
