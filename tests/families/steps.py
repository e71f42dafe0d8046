"""The training steps of the golden files: what each original trainer masks, weighs and divides by, and its loss."""

from typing import NamedTuple

import numpy as np
import torch

from dfactory.packing import PackedDocument, collate
from dfactory.types import AlignedDocument, View, ViewBatch


class NoisedView(NamedTuple):
    """A view of each document D of L tokens, all of which it holds; its targets are the masked response tokens."""

    noisy_DL: torch.Tensor
    weight_DL: torch.Tensor  # of a target's negative log-likelihood in the loss, the division included
    nll_DL: torch.Tensor | None = None  # the original's, where it is recorded


class Step(NamedTuple):
    """A published loss = sum over targets of weight * nll."""

    name: str
    block_size: int | None  # None: whole documents
    views: list[NoisedView]
    loss: float
    grad_norms: dict[str, float] | None = None
    grad_norm_total: float | None = None


def published_steps(golden) -> list[Step]:
    """All losses of expected.json that come from masks; none for a family whose noise is another."""
    makers = {"llada": _llada, "dream": _dream, "sdar": _sdar, "fast": _fast_dllm, "a2d": _a2d}
    kind = golden.expected["family"].split("_")[0]
    return makers[kind](golden) if kind in makers else []


def response(golden) -> torch.Tensor:
    return golden.labels != -100


def masked(golden, noisy: torch.Tensor) -> torch.Tensor:
    return response(golden) & (noisy == golden.expected["mask_token_id"])


def batch_of(golden, step: Step, rows) -> ViewBatch:
    """The step by way of views and packing; `rows` name the documents of each row."""
    documents, length = golden.input_ids.shape
    packed = []
    for d in range(documents):
        ids, trainable = golden.input_ids[d].numpy().astype(np.int32), response(golden)[d].numpy()
        views = [_view(golden, view, d, length) for view in step.views]
        packed.append(PackedDocument(AlignedDocument(d, ids, trainable, step.block_size or length), views))
    return collate([[packed[d] for d in row] for row in rows], step.block_size or 1)


def _view(golden, view: NoisedView, d: int, length: int) -> View:
    target, weight = masked(golden, view.noisy_DL)[d].numpy(), view.weight_DL[d].float().numpy()
    noisy = view.noisy_DL[d].numpy().astype(np.int32)
    return View(np.arange(length, dtype=np.int32), noisy, target, np.ones(length, np.float32), weight)


def expected_nll(golden, step: Step) -> torch.Tensor | None:
    """The original's nll of every target, in the order of `batch_of` (documents, then views); None: not recorded."""
    if any(view.nll_DL is None for view in step.views):
        return None
    documents = range(len(golden.input_ids))
    return torch.cat([v.nll_DL[d][masked(golden, v.noisy_DL)[d]] for d in documents for v in step.views])


def _each(golden, weight: torch.Tensor) -> torch.Tensor:
    """One number a document, or one in all, at each of its positions."""
    return weight.reshape(-1, 1).double().expand(golden.input_ids.shape)


def _step(golden, name, weight, loss, *, block_size=None, nll=None, norms=None) -> Step:
    """A step of the one noisy view that the files have."""
    view = NoisedView(golden.noisy_ids, _each(golden, weight) if weight.dim() < 2 else weight, nll)
    norms = norms or {}
    return Step(name, block_size, [view], loss, norms.get("grad_norms"), norms.get("grad_norm_total"))


def _mean_over_masked(golden) -> torch.Tensor:
    return 1 / masked(golden, golden.noisy_ids).sum()


def _llada(golden) -> list[Step]:
    e, p, answer = golden.expected, golden.p_mask.double(), response(golden).sum(1)
    other = {name.split()[0]: loss for name, loss in e["other_losses"].items()}
    documents = len(golden.input_ids)
    return [
        _step(golden, "sft", 1 / p / answer / documents, e["loss"], nll=golden.token_nll, norms=e),
        _step(golden, "pretraining", 1 / p / golden.input_ids.numel(), other["pretraining"]),
        _step(golden, "dllm", 1 / (p + 1e-6) / answer.sum(), other["dllm"]),
        _step(golden, "mean", _mean_over_masked(golden), other["mean"]),
    ]


def _sdar(golden) -> list[Step]:
    e, answer = golden.expected, response(golden).sum()
    size, mean = e["block_size"], e["other_losses"]["mean over masked tokens of nll"]
    weight = 1 / golden.p_mask.double() / answer
    return [
        _step(golden, "sft", weight, e["loss"], block_size=size, nll=golden.token_nll, norms=e),
        _step(golden, "mean", _mean_over_masked(golden), mean, block_size=size),
    ]


def cart(visible_DL: torch.Tensor, p: float) -> torch.Tensor:
    """Dream's context-adaptive weights: visible tokens j add 0.5 p (1 - p)^(|i - j| - 1) to position i."""
    position = torch.arange(visible_DL.shape[1])
    distance = (position[:, None] - position).abs()
    each = (0.5 * p * (1 - p) ** (distance - 1).double()).masked_fill(distance == 0, 0)
    return visible_DL.double() @ each


def _dream(golden) -> list[Step]:
    e, t, mean = golden.expected, golden.t.double(), _mean_over_masked(golden)
    visible = ~masked(golden, golden.noisy_ids)
    by_name = {"cart": cart(visible, 0.1), "original": 1 / t, "linear": 1 - t, "none": torch.ones_like(t)}
    norms = {"cart": e, "original": e["original"]}
    steps = [
        _step(golden, name, weight * mean, e["losses"][name], nll=golden.token_nll, norms=norms.get(name))
        for name, weight in by_name.items()
    ]
    (dllm,) = [loss for name, loss in e["other_losses"].items() if name.startswith("dllm")]
    return [*steps, _step(golden, "dllm", cart(visible, 0.3) / response(golden).sum(), dllm)]


def _fast_dllm(golden) -> list[Step]:
    """Two views of each document that mask the two halves of its response, both after all first views in the file."""
    e, (documents, length) = golden.expected, golden.input_ids.shape
    noisy = golden.train_input_ids[:, :length].split(documents)
    targets = sum(masked(golden, each).sum() for each in noisy)
    weight = _each(golden, 1 / targets)
    views = [NoisedView(n, weight, nll) for n, nll in zip(noisy, golden.token_nll.split(documents), strict=True)]
    return [Step("complementary", e["block_size"], views, e["loss"], e["grad_norms"], e["grad_norm_total"])]


def _a2d(golden) -> list[Step]:
    e, weight = golden.expected, 1 / (golden.t.double() + 1e-6) / response(golden).sum()
    nll = {"mdlm": golden.mdlm_token_nll, "bd3lm": golden.bd3lm_token_nll}
    sizes = {"mdlm": None, "bd3lm": e["block_size"]}
    return [
        _step(golden, name, weight, e[name]["loss"], block_size=size, nll=nll[name], norms=e[name])
        for name, size in sizes.items()
    ]
