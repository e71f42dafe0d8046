"""What a recipe's records cost, counted, not timed: positions, attention pairs and head rows, idea by idea.

    python -m benchmarks.operations recipes/quickstart/sft.yaml
    python -m benchmarks.operations recipes/quickstart/dpo.yaml datasets='[{path: mine.jsonl}]' --windows 100

The first line is the way of the peers that have block masks and score targets only: noisy ++ clean rows of twice the
length, one for every view, of whose pairs a kernel computes the visible ones. Each further line adds one idea of dFactory's
and keeps those above it; the last is what `dfactory train` computes. Everything is exact, over the first windows of the
recipe's own source. `positions` and `pairs` are sums over the layers; the last layer's keys and values, which all positions
need, are left out. Operations are of forward and backward: two for a multiplication and an addition, and a backward is two
forwards.
"""

import argparse
import sys
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from dfactory.assembly import make_source, read_inputs
from dfactory.models.hub import resolve
from dfactory.models.registry import read_config
from dfactory.planning.memory import count_parameters
from dfactory.planning.utilisation import PASSES, visible_pairs
from dfactory.recipe import Recipe, load_recipe
from dfactory.types import PADDING, ViewBatch


class Cost(NamedTuple):
    """Of one layer, or of all of them."""

    positions: int
    pairs: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.positions + other.positions, self.pairs + other.pairs)

    def times(self, layers: int) -> "Cost":
        return Cost(layers * self.positions, layers * self.pairs)


WAYS = (
    "noisy ++ clean rows, a view each",
    "no views of blocks without targets",
    "one clean stream for all views",
    "no clean copy of the last block",
    "shared prefixes",
    "the last layer at the targets",
)


def costs_of(batch: ViewBatch, block: int, layers: int) -> list[Cost]:
    """Of a batch in each of WAYS, over all layers."""
    document, view, number, _ = (field.numpy().astype(np.int64).reshape(-1) for field in batch.place_RS)
    in_view = (view > 0) & (document != PADDING)
    views_D = batch.num_views_D.numpy().astype(np.int64)
    blocks_D = np.zeros(len(views_D), np.int64)  # of the whole document; 0 for a shared prefix, which has no view
    np.maximum.at(blocks_D, document[in_view], number[in_view] + 1)
    clean = Cost(int(block * blocks_D.sum()), int(block**2 * (blocks_D * (blocks_D + 1) // 2).sum()))
    each = Cost(
        int(block * (views_D * blocks_D).sum()), int(block**2 * (views_D * blocks_D * (blocks_D + 1) // 2).sum())
    )
    noisy = Cost(int(in_view.sum()), int((block * (number[in_view] + 1)).sum()))
    last = Cost(int(block * (blocks_D > 0).sum()), int(block**2 * blocks_D.sum()))
    pairs = visible_pairs(batch)
    ours = Cost(batch.num_tokens, pairs.all)
    everywhere = [each + each, each + noisy, clean + noisy, clean + noisy + last.times(-1), ours]
    at_targets = ours.times(layers - 1) + Cost(batch.num_targets, pairs.of_targets)
    return [cost.times(layers) for cost in everywhere] + [at_targets]


class Count(NamedTuple):
    ways: dict[str, Cost]
    targets: int
    flops: dict[str, float]


def count(recipe: Recipe, windows: int) -> Count:
    """The first windows of a recipe, or all that there are."""
    inputs = read_inputs(recipe)
    model_dir = resolve(recipe.model_name_or_path, recipe.model_revision, weights=False)
    config, parameters = read_config(model_dir), count_parameters(model_dir)
    source, layers = make_source(recipe, inputs, 0, 1), config.num_hidden_layers
    totals, targets = [Cost(0, 0)] * len(WAYS), 0
    for _ in range(windows):
        if (window := source.next_window()) is None:
            break
        for batch in window:
            found = costs_of(batch, recipe.aligned_block_size, layers)
            totals = [a + b for a, b in zip(totals, found, strict=True)]
            targets += batch.num_targets
    head_size = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    a_position = 2 * (parameters.active - parameters.vocabulary) / layers
    head = 2 * config.hidden_size * config.vocab_size * targets
    flops = [
        PASSES * (a_position * c.positions + 4 * config.num_attention_heads * head_size * c.pairs + head)
        for c in totals
    ]
    return Count(dict(zip(WAYS, totals, strict=True)), targets, dict(zip(WAYS, flops, strict=True)))


def show(found: Count, title: str) -> Table:
    table = Table("", "positions", "pairs", "operations, 1e9", "first / this", title=title)
    first = found.flops[WAYS[0]]
    for name, cost in found.ways.items():
        flops = found.flops[name]
        numbers = [f"{cost.positions:,}", f"{cost.pairs:,}", f"{flops / 1e9:,.1f}", f"{first / flops:.2f}"]
        table.add_row(name if name == WAYS[0] else f"+ {name}", *numbers)
    table.caption = f"{found.targets:,} targets, in the head once each"
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="block-causal, of records: not of stage rl")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--windows", type=int, default=20, help="global batches that are counted (default: %(default)s)"
    )
    options = parser.parse_intermixed_args(arguments)
    recipe = load_recipe(options.recipe, options.overrides)
    if recipe.block_size is None:
        parser.error(f"{options.recipe} has block_size null: with full attention there is no clean stream to share")
    found = count(recipe, options.windows)
    Console(width=120, highlight=False).print(show(found, f"{options.recipe}, {options.windows} windows"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
