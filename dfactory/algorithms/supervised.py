"""What algorithms share that train on records as they are."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dfactory.algorithms.base import Algorithm
from dfactory.algorithms.loss_weights import LOSS_WEIGHTS, OWN, PUBLISHED_NOISE
from dfactory.config.keys import key

CART_P = 0.1  # Dream-Coder's; dllm has 0.3


@dataclass
class SupervisedKeys:
    loss_weight: str = key(
        "uniform",
        "what a target weighs, and what the sum is divided by. "
        + "; ".join(f"{weight.name}: {weight.meaning}" for weight in LOSS_WEIGHTS.values()),
        choices=tuple(LOSS_WEIGHTS),
    )
    cart_p: float = key(
        CART_P,
        "with context-adaptive weights: p of the geometric distribution over the distance to a token that is not masked; "
        "0.1 in Dream-Coder, 0.3 in dllm",
        low=0.001,
        high=0.999,
    )
    context_loss_weight: float = key(
        0.0,
        "with view_source uniform: weight of the mean next-token loss of the clean text, prompt included; 1.0: as "
        "DiffusionGemma is trained",
        low=0.0,
    )


class Supervised(Algorithm):
    Keys = SupervisedKeys

    def problems(self, recipe: Any) -> Iterator[str]:
        weight, shown = LOSS_WEIGHTS[recipe.loss_weight], f"loss_weight {recipe.loss_weight}"
        if recipe.edits and weight.name != "uniform":
            yield (
                f"{shown} with edit_share {recipe.edit_share:g}, num_turns {recipe.num_turns}: "
                "1/t has a meaning for masked targets only; use uniform"
            )
        if recipe.views_are_traces and weight.name not in OWN:
            yield f"{shown} with view_source {recipe.view_source}: it weighs random masks; use one of {', '.join(OWN)}"
        if weight.is_cart and recipe.block_size is not None:
            yield (
                f"{shown} with block_size {recipe.block_size}: it looks at all tokens of a document, which a view holds "
                "with full attention alone; use elbo"
            )
        if recipe.cart_p != CART_P and not weight.is_cart:
            yield f"cart_p {recipe.cart_p:g} with {shown}, whose weights have no such number: leave it out"

    def warnings(self, recipe: Any) -> Iterator[str]:
        if recipe.loss_weight in OWN:
            return
        others = {
            name: getattr(recipe, name) for name, value in PUBLISHED_NOISE.items() if getattr(recipe, name) != value
        }
        if others:
            keys = " ".join(f"{name}={_yaml(PUBLISHED_NOISE[name])}" for name in others)
            yield f"loss_weight {recipe.loss_weight} goes with other noise in its source: set {keys}"

    def dividing_key(self, recipe: Any) -> str | None:
        divides = LOSS_WEIGHTS[recipe.loss_weight].divides_by_t
        return f"loss_weight {recipe.loss_weight}" if divides else None


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"
