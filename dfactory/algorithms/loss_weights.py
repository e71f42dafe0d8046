"""What a target weighs in supervised training, and what the sum is divided by (docs/method.md#loss-weights).

    L = - sum over views, targets i of  w_i log p(x0_i | view)  /  Z

A record with a weight c has c w for w, and counts c times in Z: as if it stood c times in the file with the same noise.
`uniform` and `elbo` are the house's own. The others are what other projects compute, under the names of their sources, so
that a run of theirs goes on with its loss. A mean over rows is a sum of w_i / length of the row, divided by the number of
rows; a row there is a view here.
"""

import dataclasses
from collections.abc import Callable

import torch

from dfactory.types import Count, ViewBatch

TARGETS_AT_ONCE = 1024  # whose distances to all positions of a packed sequence are in memory together
EPSILON = 1e-6  # dllm's, which is added to t


@dataclasses.dataclass(frozen=True)
class LossWeight:
    """A row of the table: w as a function of a batch and `cart_p`, and this batch's share of Z."""

    name: str
    meaning: str  # w and Z in words, and whose they are
    weigh: Callable[[ViewBatch, float], torch.Tensor]  # float32 [N]
    count: Callable[[ViewBatch], Count]
    divides_by_t: bool = False
    is_cart: bool = False  # reads the tokens around a target that are not masked


def _one(batch: ViewBatch, cart_p: float) -> torch.Tensor:
    return torch.ones_like(batch.elbo_weight_N)


def _inverse_t(batch: ViewBatch, cart_p: float) -> torch.Tensor:
    return batch.elbo_weight_N


def _visible_share(batch: ViewBatch, cart_p: float) -> torch.Tensor:
    return 1 - batch.t_N


def _inverse_t_epsilon(batch: ViewBatch, cart_p: float) -> torch.Tensor:
    """1 / (t + 1e-6)."""
    return batch.elbo_weight_N / (1 + EPSILON * batch.elbo_weight_N)


def _over_length(weigh: Callable[[ViewBatch, float], torch.Tensor]) -> Callable[[ViewBatch, float], torch.Tensor]:
    return lambda batch, cart_p: weigh(batch, cart_p) / batch.response_length_D[batch.document_N]


def cart(batch: ViewBatch, cart_p: float) -> torch.Tensor:
    """Context-adaptive weights: of each target i the sum over the tokens j of its view that are not masked, the prompt's
    included, of p (1 - p)^(|i - j| - 1) / 2. Targets are the masks of a view.

    p 0.1, view   a [M] b [M]     target 1: (1 + 1) 0.05     target 3: (0.9^2 + 1) 0.05
    """
    width = batch.input_ids_RS.shape[1]
    shown = torch.ones_like(batch.document_RS, dtype=torch.bool).flatten()
    shown[batch.target_index_N] = False
    weights = []
    for index in batch.target_index_N.split(TARGETS_AT_ONCE):
        document, view, position = (
            (rows_RS[index // width], rows_RS.flatten()[index, None])
            for rows_RS in (batch.document_RS, batch.view_RS, batch.position_ids_RS)
        )
        beside = (document[0] == document[1]) & (view[0] == view[1]) & shown.unflatten(0, (-1, width))[index // width]
        distance = (position[0] - position[1]).abs()
        weights.append((0.5 * cart_p * (1 - cart_p) ** (distance - 1) * beside).sum(dim=1))
    return torch.cat(weights) if weights else batch.elbo_weight_N


def by_document(batch: ViewBatch, value_D: torch.Tensor) -> torch.Tensor:
    """A number per document times what its record counts; as it is where no record has a weight."""
    weight_D = batch.columns.get("weight_D")
    return value_D if weight_D is None else value_D * weight_D


def by_target(batch: ViewBatch, value_N: torch.Tensor) -> torch.Tensor:
    """The same of a number per target."""
    weight_D = batch.columns.get("weight_D")
    return value_N if weight_D is None else value_N * weight_D[batch.document_N]


def _targets(batch: ViewBatch) -> Count:
    if "weight_D" not in batch.columns:
        return float(batch.num_targets)
    return by_target(batch, torch.ones_like(batch.elbo_weight_N)).sum()


def _response_tokens(batch: ViewBatch) -> Count:
    return by_document(batch, batch.response_length_D * batch.num_views_D).sum()


def _views(batch: ViewBatch) -> Count:
    return by_document(batch, batch.num_views_D).sum()


def _positions(batch: ViewBatch) -> Count:
    in_view_RS = batch.view_RS > 0
    weight_D = batch.columns.get("weight_D")
    return (in_view_RS if weight_D is None else weight_D[batch.document_RS[in_view_RS]]).sum()


LOSS_WEIGHTS = {
    weight.name: weight
    for weight in (
        LossWeight("uniform", "1 over targets (LLaDA2, Fast-dLLM v2; Dream-Coder: none)", _one, _targets),
        LossWeight("elbo", "1/t over response tokens (LLaDA2.0's bound, SDAR)", _inverse_t, _response_tokens, True),
        LossWeight(
            "llada_sft", "1/t over response tokens of each row, mean over rows", _over_length(_inverse_t), _views, True
        ),
        LossWeight("llada_pretraining", "1/t over all tokens, the prompt's included", _inverse_t, _positions, True),
        LossWeight("dream_cart", "context-adaptive over targets (Dream-Coder)", cart, _targets, is_cart=True),
        LossWeight("dream_original", "1/t over targets (Dream-Coder)", _inverse_t, _targets, True),
        LossWeight("dream_linear", "1 - t over targets (Dream-Coder)", _visible_share, _targets),
        LossWeight(
            "dllm_token", "1/(t + 1e-6) over response tokens (its default)", _inverse_t_epsilon, _response_tokens, True
        ),
        LossWeight(
            "dllm_sequence",
            "1/(t + 1e-6) over response tokens of each row, mean over rows",
            _over_length(_inverse_t_epsilon),
            _views,
            True,
        ),
        LossWeight("dllm_batch", "1/(t + 1e-6) over rows", _inverse_t_epsilon, _views, True),
        LossWeight(
            "dllm_cart", "context-adaptive over response tokens (dllm's Dream)", cart, _response_tokens, is_cart=True
        ),
    )
}
PUBLISHED_NOISE = {"noise_range_low": 0.001, "noise_range_high": 1.0, "noise_level": "document", "complementary": False}
"""The noise keys of those that are other projects' own."""
OWN = ("uniform", "elbo")
