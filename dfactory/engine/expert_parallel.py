"""Expert parallelism by DeepSpeed's AutoEP: `expert_parallel_size` ranks share the experts of a layer.

`deepspeed.initialize` replaces each MoE block by an AutoEPMoELayer, which keeps E / size experts and sends every token to
the ranks that have its experts. Ranks are divided twice: consecutive ones into groups that hold a layer together, and
those with the same experts into groups over which ZeRO divides them.

Two things are put right here. AutoEP computes the router's logits in the precision of the stream, some families in fp32;
and it knows no way back, so `whole_layer` makes from what it left the tensors that the transformers model had.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import nn

from dfactory.errors import ConfigError
from dfactory.models.families.base import FAMILIES
from dfactory.models.hub import resolve
from dfactory.models.policy import Policy
from dfactory.models.registry import read_config
from dfactory.models.saving import NamedTensors
from dfactory.recipe import Recipe

# AutoEP's names -> those of the transformers blocks that it takes; w1 (gate) and w3 (up) are distinguished below.
_RENAMED = {
    "router.gate.weight": "gate.weight",
    "router.e_score_correction_bias": "gate.e_score_correction_bias",
    "experts.w2": "experts.down_proj",
}


def autoep_section(recipe: Recipe) -> dict[str, Any]:
    """`expert_parallel` of DeepSpeed's configuration. Raises ConfigError where the model or the recipe does not allow it."""
    size = recipe.expert_parallel_size
    if size == 1:
        return {"enabled": False}
    config = read_config(resolve(recipe.model_name_or_path, recipe.model_revision, weights=False))
    family = FAMILIES.of(config)
    autoep = family.autoep
    if autoep is None:
        moe = bool(family.moe_blocks)
        reason = f"states no `autoep` in the model family {family.name}" if moe else "has no experts"
        raise ConfigError(f"expert_parallel_size {size}: model_type {config.model_type} {reason}; set it to 1")
    if recipe.use_peft:
        raise ConfigError(
            f"expert_parallel_size {size} with use_peft is not supported: AutoEP does not find the blocks under adapters; "
            "set it to 1, or use_peft to false"
        )
    if config.num_local_experts % size:
        raise ConfigError(
            f"expert_parallel_size {size} does not divide the {config.num_local_experts} experts of "
            f"{recipe.model_name_or_path}: choose a divisor"
        )
    section = {"enabled": True, "autoep_size": size, "route_norm": config.norm_topk_prob, **autoep}
    return section | {"moe_layer_pattern": rf"model\.{autoep['moe_layer_pattern']}"}  # the Policy holds it as `model`


def check_ranks(recipe: Recipe, world_size: int) -> None:
    """Raise ConfigError unless the ranks can be divided into groups of expert_parallel_size."""
    if world_size % recipe.expert_parallel_size:
        raise ConfigError(
            f"expert_parallel_size {recipe.expert_parallel_size} does not divide the {world_size} rank(s) of this run: "
            "start it on a multiple, or choose a divisor"
        )


class _RouterInFloat32(nn.Linear):
    """The router's logits of a family that `routes_in_float32`, whatever the precision of the stream."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden.float(), self.weight.float())


def autoep_layers(policy: Policy) -> list[AutoEPMoELayer]:
    return [module for module in policy.modules() if isinstance(module, AutoEPMoELayer)]


def finish_layers(policy: Policy, block_names: list[str]) -> None:
    """After deepspeed.initialize: all MoE blocks have to be AutoEP's, and their routers become the family's."""
    replaced = {name for name, module in policy.named_modules() if isinstance(module, AutoEPMoELayer)}
    if replaced != set(block_names):
        left = sorted(set(block_names) ^ replaced)
        raise RuntimeError(f"AutoEP did not take the MoE blocks {left}: its moe_layer_pattern does not fit them")
    for layer in autoep_layers(policy) if policy.family.routes_in_float32 else ():
        layer.router.gate.__class__ = _RouterInFloat32


class WholeLayers:
    """Turns the tensors of a decoder layer back into those of the transformers model; `saving` calls it layer by layer.

    Every rank has to call it with its tensors gathered (under ZeRO-3); only one with `keep` gets the experts' values.
    """

    def __init__(self, policy: Policy, keep: bool):
        self.groups = {
            name.removeprefix("model."): module.ep_group
            for name, module in policy.named_modules()
            if isinstance(module, AutoEPMoELayer)
        }
        self.keep = keep

    def __call__(self, tensors: NamedTensors) -> NamedTensors:
        blocks: dict[str, dict[str, torch.Tensor]] = {}
        whole: NamedTensors = []
        for name, tensor in tensors:
            block = next((block for block in self.groups if name.startswith(f"{block}.")), None)
            rest = name.removeprefix(f"{block}.")
            if block is not None and rest.startswith("experts."):
                tensor = self._all_experts(tensor, self.groups[block])
            if block is None or rest not in {*_RENAMED, "experts.w1", "experts.w3"}:
                whole.append((name, tensor))
            elif rest in _RENAMED:
                whole.append((f"{block}.{_RENAMED[rest]}", tensor))
            else:
                blocks.setdefault(block, {})[rest] = tensor
        for block, parts in blocks.items():
            gate_up = torch.cat([parts["experts.w1"], parts["experts.w3"]], dim=1)  # [E, 2I, H]
            whole.append((f"{block}.experts.gate_up_proj", gate_up))
        return whole

    def _all_experts(self, mine: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, mine.detach().contiguous(), group=group)
        return torch.cat([part.cpu() for part in parts]) if self.keep else mine.new_empty(0, *mine.shape[1:])
