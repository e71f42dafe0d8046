"""An exponential moving average of the trained weights, which is evaluated and saved in their place.

After each step e <- d e + (1 - d) w, in fp32, from the weights that the run starts with. Under ZeRO 0, 1 and 2 every rank
has all weights and so the whole average; under ZeRO 3 it has that of its shards. Training goes on with the weights
themselves: `in_place` puts the average into the model for as long as it is evaluated or written, and then the weights back,
bit for bit. A checkpoint holds the average in fp32 as engine/average.safetensors, whole, so that it is resumed on any
number of ranks.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from dfactory.errors import CheckpointError

FILE = "average.safetensors"


class Average:
    """Of the trained parameters of a model, by name. All ranks call the same methods in the same order."""

    def __init__(self, model: nn.Module, decay: float, zero_stage: int):
        self.decay, self.sharded = decay, zero_stage == 3
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.values = {name: self._own(p).float().clone() for name, p in self.parameters.items()}

    def _own(self, parameter: nn.Parameter) -> torch.Tensor:
        """What this rank holds of it."""
        return (parameter.ds_tensor if self.sharded else parameter).detach()

    @torch.no_grad()
    def update(self) -> None:
        """After a step."""
        for name, parameter in self.parameters.items():
            self.values[name].lerp_(self._own(parameter).float(), 1 - self.decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the model has the average for weights."""
        kept = {name: self._own(p).clone() for name, p in self.parameters.items()}
        self._put(self.values)
        try:
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, values: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            if not self.sharded:
                parameter.copy_(values[name])
                continue
            whole = self._whole(parameter, values[name])
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(whole)

    def _whole(self, parameter: nn.Parameter, own: torch.Tensor) -> torch.Tensor:
        """A tensor of all ranks' shards, which ZeRO-3 pads to one length."""
        if not self.sharded:
            return own
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)

    def save(self, folder: Path) -> None:
        """Write the average of all ranks; the first rank does."""
        whole = {name: self._whole(p, self.values[name]).cpu() for name, p in self.parameters.items()}
        if dist.get_rank() == 0:
            save_file({name: value.contiguous() for name, value in whole.items()}, folder / FILE)

    def load(self, folder: Path) -> bool:
        """Go on with a saved average. Returns whether there was one; without one the average begins at the weights that the
        model has now. Raises CheckpointError for one of other parameters."""
        file = folder / FILE
        if not file.is_file():
            self.values = {name: self._own(p).float().clone() for name, p in self.parameters.items()}
            return False
        saved = load_file(file)
        if saved.keys() != self.parameters.keys():
            raise CheckpointError(
                f"{file} is of other parameters than those that are trained: resume with the same ones"
            )
        for name, parameter in self.parameters.items():
            self.values[name].copy_(self._part(parameter, saved[name]))
        return True

    def _part(self, parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
        """This rank's shard of a tensor, with zeros for its padding."""
        if not self.sharded:
            return whole
        size = parameter.ds_tensor.numel()
        flat = torch.zeros(size * dist.get_world_size())
        flat[: whole.numel()] = whole.flatten()
        return flat[dist.get_rank() * size :][:size]
