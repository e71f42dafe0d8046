"""The optimiser of a recipe: its parameter groups, and how DeepSpeed comes to it.

| `optim` | whose | ZeRO |
|---|---|---|
| `adamw` | torch's AdamW, fused; with offload_optimizer DeepSpeed's own for the host | 0 to 3 |
| `adamw_8bit` | bitsandbytes' AdamW, whose moments take one byte each | 0 to 3, without offload |
| `adafactor` | torch's Adafactor, a number a row and a column for the second moment | 0: it needs whole matrices |
| `muon` | DeepSpeed's Muon for hidden matrices, AdamW for the rest | 1 to 3 |

DeepSpeed makes AdamW and Muon from its configuration; the other two are made here. What cannot be right under a ZeRO stage
is refused.
"""

import importlib
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from dfactory.errors import ConfigError
from dfactory.recipe import Recipe

Groups = list[dict[str, Any]]
FROM_CONFIG = ("adamw", "muon")  # DeepSpeed makes them


def optimizer_section(recipe: Recipe, *, offloaded: bool) -> dict[str, Any]:
    """The keys of a DeepSpeed configuration that the recipe's optimiser decides."""
    options = {
        "lr": recipe.learning_rate,
        "betas": [recipe.adam_beta1, recipe.adam_beta2],
        "eps": recipe.adam_epsilon,
        "weight_decay": recipe.weight_decay,
    }
    if not offloaded:  # torch's AdamW: DeepSpeed's own is compiled at the start, which needs the CUDA compiler
        options |= {"torch_adam": True, "fused": True}
    elif not torch.cuda.is_available():
        options["torch_adam"] = True
    if recipe.optim == "muon":
        rate = recipe.learning_rate if recipe.muon_learning_rate is None else recipe.muon_learning_rate
        options |= {"muon_lr": rate, "momentum": 0.95}
        return {"optimizer": {"type": "Muon", "params": options}}
    if recipe.optim == "adamw":
        return {"optimizer": {"type": "AdamW", "params": options}}
    return {"zero_allow_untested_optimizer": True}


def refuse_unsupported(recipe: Recipe, stage: int, *, offloaded: bool) -> None:
    """Raise ConfigError for an optimiser that would not be right under this ZeRO stage, with what to do."""
    for broken, why in _problems(recipe, stage, offloaded):
        if broken:
            raise ConfigError(f"optim {recipe.optim} with {why}")


def _problems(recipe: Recipe, stage: int, offloaded: bool) -> Iterable[tuple[bool, str]]:
    zero = f"zero_optimization.stage {stage}"
    if recipe.optim == "adafactor":
        yield (
            stage > 0,
            f"{zero}: its shards are flat, and Adafactor needs the rows and columns of whole matrices; use dtype float32 "
            "with stage 0, or optim adamw_8bit to save memory",
        )
    if recipe.optim == "muon":
        yield stage == 0, f"{zero}: nothing would skip a step with a NaN there; use stage 1, 2 or 3"
        yield (
            recipe.max_grad_norm > 0,
            f"max_grad_norm {recipe.max_grad_norm:g}: DeepSpeed would clip the orthogonalised update and not the gradient, "
            "so that the step is as good as gone; set max_grad_norm to 0",
        )
        yield (
            recipe.embedding_max_grad_norm is not None,
            f"embedding_max_grad_norm {recipe.embedding_max_grad_norm}: its momentum is in the gradients by then; leave it "
            "out",
        )
    if recipe.optim != "adamw":
        yield (
            offloaded,
            "offload_optimizer: only AdamW has a kernel for the host; leave offload_optimizer out, or use optim adamw",
        )
        yield (
            recipe.expert_parallel_size > 1,
            f"expert_parallel_size {recipe.expert_parallel_size}: its parameter groups are those of AdamW; use optim adamw",
        )
    if recipe.optim == "adamw_8bit":
        yield (
            find_spec("bitsandbytes") is None,
            "bitsandbytes not installed: run `pip install bitsandbytes`, or use optim adamw",
        )


def made_here(recipe: Recipe) -> Callable[[Groups], torch.optim.Optimizer] | None:
    """What makes the optimiser from parameter groups; None where DeepSpeed does."""
    if recipe.optim in FROM_CONFIG:
        return None
    betas = (recipe.adam_beta1, recipe.adam_beta2)
    if recipe.optim == "adafactor":
        return lambda groups: _skipping(torch.optim.Adafactor)(
            groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
    kind = importlib.import_module("bitsandbytes").optim.AdamW8bit
    return lambda groups: _skipping(kind)(
        groups, lr=recipe.learning_rate, betas=betas, eps=recipe.adam_epsilon, weight_decay=recipe.weight_decay
    )


def _skipping(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The same optimiser, which skips a step where `found_inf` is set, as torch's fused AdamW does on the device. torch's
    own steps may refuse to see that flag, so it is taken away before."""

    class Skipping(kind):
        found_inf: torch.Tensor | None = None

        def step(self, closure=None):
            found, self.found_inf = self.found_inf, None
            return None if found is not None and found.item() else super().step(closure)

    Skipping.__name__ = kind.__name__
    return Skipping


def parameter_groups(policy: nn.Module, recipe: Recipe) -> Groups:
    """Parameters in groups: matrices decay; norms and other vectors do not; embedding and head have their own learning rate
    where the recipe gives one. A ZeRO-3 shard has its whole shape in `ds_shape`."""
    trainable = [p for p in policy.parameters() if p.requires_grad]
    ends = {id(p) for p in ends_of(policy)} if recipe.embedding_learning_rate is not None else set()
    matrices = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) > 1 and id(p) not in ends]
    vectors = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) <= 1]
    own = [p for p in trainable if id(p) in ends]
    decay = recipe.weight_decay
    groups = [  # DeepSpeed needs names where it splits off the experts
        {"params": matrices, "weight_decay": decay, "name": "matrices"},
        {"params": vectors, "weight_decay": 0.0, "name": "vectors"},
        {"params": own, "weight_decay": decay, "name": "embeddings", "lr": recipe.embedding_learning_rate},
    ]
    return [group for group in groups if group["params"]]


def clipped_apart(policy: nn.Module, recipe: Recipe) -> list[nn.Parameter]:
    """The weights whose gradients `embedding_max_grad_norm` clips; none without it. Raises ConfigError if all are frozen."""
    if recipe.embedding_max_grad_norm is None:
        return []
    if not (ends := ends_of(policy)):
        raise ConfigError(
            f"embedding_max_grad_norm {recipe.embedding_max_grad_norm:g} with frozen_parameters "
            f"{recipe.frozen_parameters}: embedding and head are not trained; leave it out"
        )
    return ends


def ends_of(policy: nn.Module) -> list[nn.Parameter]:
    """The trained weights of embedding and head; one where they are tied."""
    ends = (policy.model.get_input_embeddings(), policy.model.get_output_embeddings())
    weights = {id(end.weight): end.weight for end in ends if end is not None}
    return [weight for weight in weights.values() if weight.requires_grad]
