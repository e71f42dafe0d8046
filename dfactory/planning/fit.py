"""Whether a setup fits a GPU, and the first change of keys that makes it fit."""

import dataclasses
from pathlib import Path

from dfactory.planning.memory import MemoryForecast, Setup, forecast
from dfactory.recipe import Recipe

FITS = 72e9  # bytes: a GPU of 80 GB less 10 percent


def at_stage(setup: Setup, stage: int) -> Setup:
    """The same with another ZeRO stage; offload needs sharding."""
    return dataclasses.replace(
        setup,
        zero_stage=stage,
        offload_optimizer=setup.offload_optimizer and stage >= 1,
        offload_param=setup.offload_param and stage == 3,
    )


def remedy_of(path: Path, recipe: Recipe, setup: Setup) -> tuple[str, MemoryForecast] | None:
    """The first of some changes with which a setup fits, as words of the command line, and its forecast; None if none
    does."""
    sharded = {"zero_stage": 3, "gradient_checkpointing": True}
    adapters = {"lora_r": recipe.lora_r, "lora_target_modules": tuple(recipe.lora_target_modules)}
    remedies = {
        "gradient_checkpointing=true": {"gradient_checkpointing": True},
        "deepspeed=recipes/deepspeed/zero3.json": {"zero_stage": 3},
        "gradient_checkpointing=true deepspeed=recipes/deepspeed/zero3.json": sharded,
        "gradient_checkpointing=true deepspeed=recipes/deepspeed/zero3_offload.json": {
            **sharded,
            "offload_optimizer": True,
        },
        "use_peft=true gradient_checkpointing=true deepspeed=recipes/deepspeed/zero3.json": {**sharded, **adapters},
    }
    for words, change in remedies.items():
        memory = forecast(path, dataclasses.replace(setup, **change))
        if memory.device_bytes < FITS:
            return words, memory
    return None
