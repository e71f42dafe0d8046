"""What it saves to compute the prompt of a group once: rollouts of one prompt with a shared clean stream and without.

    python -m benchmarks.tree

makes a random LLaDA2-MoE and a group of random responses to one prompt, a masked view each, and packs them into a row
twice: with a prompt each, and with the prompt's clean stream in common, as training does. Prints the positions of the row,
the median seconds of a forward with its backward, both measured in turn, how far losses and gradients differ, and how many
fewer operations there are (by visible pairs, dfactory/planning/costs.py): what a machine of constant rate would gain.
`--generations 2` is a preference pair.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dfactory.models.policy import Policy
from dfactory.models.registry import load_policy
from dfactory.models.tiny import write_tiny_config
from dfactory.noise import RandomMask
from dfactory.packing import PackedDocument, collate, share
from dfactory.planning.costs import Work, forward_flops, step_flops
from dfactory.types import AlignedDocument, ViewBatch
from dfactory.visibility import dense_mask

OWN, SHARED = "a prompt each", "one prompt"


def make_policy(sizes: argparse.Namespace) -> Policy:
    with tempfile.TemporaryDirectory() as folder:
        directory = write_tiny_config(
            Path(folder),
            vocab_size=sizes.vocabulary,
            pad_token_id=None,
            hidden_size=sizes.hidden,
            intermediate_size=2 * sizes.hidden,
            moe_intermediate_size=sizes.hidden // 2,
            num_hidden_layers=sizes.layers,
            num_experts=sizes.experts,
            num_experts_per_tok=4,
            n_group=1,
            topk_group=1,
            head_dim=sizes.hidden // 4,
        )
        return load_policy(directory, dtype="float32", init_weights="random", seed=1)


def make_group(sizes: argparse.Namespace) -> list[PackedDocument]:
    """One prompt and `generations` responses, each with a view."""
    rng = np.random.default_rng(0)
    views = RandomMask(mask_id=sizes.vocabulary - 1, seed=1, low=0.3, high=0.8)
    prompt, group = rng.integers(0, sizes.vocabulary - 1, sizes.prompt), []
    for index in range(sizes.generations):
        length = sizes.prompt + sizes.response
        ids = np.concatenate([prompt, rng.integers(0, sizes.vocabulary - 1, sizes.response)]).astype(np.int32)
        document = AlignedDocument(0, ids, np.arange(length) >= sizes.prompt, sizes.block_size)
        group.append(PackedDocument(document, views(document, index)))
    return group


def step(policy: Policy, batch: ViewBatch) -> tuple[float, float, list[torch.Tensor]]:
    """Seconds of a forward and a backward, the loss, its gradients."""
    parameters, started = list(policy.parameters()), time.perf_counter()
    loss = -(batch.elbo_weight_N * policy(batch).logprob_N).sum() / batch.response_length_D.sum()
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return time.perf_counter() - started, loss.item(), [g for g in gradients if g is not None]


def operations(policy: Policy, batch: ViewBatch) -> float:
    """Of a forward and a backward, by visible pairs."""
    pairs_S = dense_mask(batch.place_RS).sum(dim=-1).flatten()
    numbers = (batch.num_tokens, pairs_S.sum(), batch.num_targets, pairs_S[batch.target_index_N].sum())
    forward = forward_flops(policy.config, Work(*map(int, numbers)))
    return sum(step_flops(forward, checkpointing=False).values())


def report(sizes: argparse.Namespace, policy: Policy, batches: dict[str, ViewBatch], results: dict[str, list]) -> Table:
    seconds = {name: statistics.median(run[0] for run in runs) for name, runs in results.items()}
    table = Table("", "row positions", "seconds, forward and backward", "loss")
    for name, batch in batches.items():
        table.add_row(name, f"{batch.num_tokens:,}", f"{seconds[name]:.3f}", f"{results[name][-1][1]:.6f}")
    (_, loss, own), (_, shared_loss, shared) = (runs[-1] for runs in results.values())
    gap = max(((a - b).abs().max() / a.abs().max().clamp(min=1e-9)).item() for a, b in zip(own, shared, strict=True))
    faster = seconds[OWN] / seconds[SHARED]
    fewer = batches[OWN].num_tokens / batches[SHARED].num_tokens
    less = operations(policy, batches[OWN]) / operations(policy, batches[SHARED])
    table.title = f"{sizes.generations} responses of {sizes.response} tokens to a prompt of {sizes.prompt}"
    table.caption = (
        f"{faster:.2f} times as fast, {fewer:.2f} times fewer positions, {less:.2f} times fewer operations, "
        f"{torch.get_num_threads()} thread(s). Losses differ by {abs(loss - shared_loss):.1e}, gradients by at most "
        f"{gap:.1e} of the largest in their tensor."
    )
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    numbers = {
        "prompt": 768,
        "response": 128,
        "generations": 8,
        "block-size": 32,
        "hidden": 256,
        "layers": 4,
        "experts": 32,
        "vocabulary": 8192,
        "repeats": 5,
    }
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=" ")
    sizes = parser.parse_args(arguments)

    policy, group = make_policy(sizes), make_group(sizes)
    batches = {OWN: collate([group], sizes.block_size), SHARED: collate([share(group)], sizes.block_size)}
    results = {name: [] for name in batches}
    for repeat in range(1 + sizes.repeats):
        for name, batch in batches.items():
            outcome = step(policy, batch)
            if repeat:  # the first one warms up
                results[name].append(outcome)

    Console(highlight=False).print(report(sizes, policy, batches, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
