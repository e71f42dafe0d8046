"""Which activations stay on the device between forward and backward pass: all, those of some layers, or none."""

import contextlib

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dfactory.errors import ConfigError
from dfactory.recipe import Recipe


def recompute(model: PreTrainedModel, kept: int) -> None:
    """Make a model's layers recompute their activations in the backward pass, but for the last `kept` ones.

    The last ones, because their backward passes come first: a layer that is recomputed finds their memory free.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers[max(len(layers) - kept, 0) :]:
        layer.gradient_checkpointing = False


def kept_note(recipe: Recipe, kept: int, layers: int) -> str:
    """What a run tells of a budget for activations. Empty without one."""
    if recipe.activation_memory_gb is None:
        return ""
    budget = f"activation_memory_gb {recipe.activation_memory_gb:g}"
    if kept == layers:
        return f"{budget} holds the activations of all {layers} layers: none is recomputed"
    which = (
        f"those of the last {kept} of {layers} layers; the others recompute theirs"
        if kept
        else (f"those of none of the {layers} layers: all recompute theirs")
    )
    return f"{budget} holds {which}"


def offloading() -> contextlib.AbstractContextManager:
    """A context for forward passes, whose activations go to pinned host memory and come back in the backward pass, beside
    the computation. Raises ConfigError without a CUDA device."""
    if not torch.cuda.is_available():
        raise ConfigError(
            "activation_offloading true needs a CUDA device, and this machine has none: activations are in host memory "
            "already; set it to false"
        )
    from trl.models.activation_offloading import OffloadActivations  # looks for an accelerator when it is imported

    return OffloadActivations()
