"""Training checkpoints: the model directory, DeepSpeed's engine state beside it, and the run's own state.

A checkpoint is written into a hidden partial directory, synced, renamed, and only then named by LATEST. Resuming on as
many ranks as before restores DeepSpeed's shards as they are; on another number they go through its universal format.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

from dfactory.data.chat import read_chat_template
from dfactory.engine.expert_parallel import WholeLayers
from dfactory.engine.runfolder import STATE, RunFolder, replace_text
from dfactory.engine.shards import read_as_data
from dfactory.engine.trainer import Trainer
from dfactory.errors import CheckpointError
from dfactory.models.saving import save_policy
from dfactory.types import TrainState

ENGINE = "engine"  # the folder of what only a resumed run reads
SHARDS, UNIVERSAL = "shards", "universal"  # DeepSpeed's tags in it


def save(trainer: Trainer, folder: RunFolder, state: TrainState, keep: int | None) -> Path:
    """Write checkpoint-N of the step in `state`; every rank has to call this. Returns its path."""
    partial = folder.path / f".checkpoint-{state.step}.partial"
    if trainer.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    save_policy(
        trainer.policy,
        partial,
        gathered=trainer.gathered,
        whole_layer=WholeLayers(trainer.policy, keep=trainer.rank == 0),
        write=trainer.rank == 0,
        block_size=trainer.recipe.block_size,
        mask_token_id=trainer.recipe.mask_token_id,
        chat_template=read_chat_template(trainer.recipe.chat_template_path),
    )
    trainer.engine.save_checkpoint(str(partial / ENGINE), tag=SHARDS, save_latest=False, exclude_frozen_parameters=True)
    dist.barrier()
    if trainer.rank == 0:
        shape = {
            "world_size": trainer.world_size,
            "zero_stage": trainer.zero_stage,
            "expert_parallel_size": trainer.recipe.expert_parallel_size,
        }
        replace_text(partial / STATE, json.dumps(dataclasses.asdict(state) | shape, indent=2) + "\n")
        folder.publish(partial, state.step, keep)
    dist.barrier()
    return folder.checkpoint(state.step)


def read_state(checkpoint: Path) -> TrainState:
    raw = json.loads((checkpoint / STATE).read_text())
    names = {field.name for field in dataclasses.fields(TrainState)}
    return TrainState(**{name: value for name, value in raw.items() if name in names})


def needs_universal(checkpoint: Path, recipe_stage: int, world_size: int, expert_parallel_size: int) -> bool:
    """Whether this many ranks cannot read the shards as they lie. Raises CheckpointError where nothing reads them."""
    raw = json.loads((checkpoint / STATE).read_text())
    if raw["zero_stage"] != recipe_stage:
        raise CheckpointError(
            f"{checkpoint} was written with ZeRO {raw['zero_stage']}, the recipe has {recipe_stage}: resume with the former"
        )
    if raw["expert_parallel_size"] != expert_parallel_size:
        raise CheckpointError(
            f"{checkpoint} was written with expert_parallel_size {raw['expert_parallel_size']}, the recipe has "
            f"{expert_parallel_size}: resume with the former, or start anew from its weights by model_name_or_path"
        )
    if expert_parallel_size > 1 and raw["world_size"] != world_size:
        raise CheckpointError(
            f"{checkpoint} was written on {raw['world_size']} ranks, there are {world_size} now, and with "
            f"expert_parallel_size {expert_parallel_size} their number has to stay: resume on as many, or start anew "
            "from its weights by model_name_or_path"
        )
    return recipe_stage > 0 and raw["world_size"] != world_size


def _make_universal(checkpoint: Path) -> None:
    """Convert DeepSpeed's shards beside themselves. Raises CheckpointError with the converter's last words."""
    command = [sys.executable, "-m", "dfactory.engine.shards", "--inject_missing_state"]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    command += ["--input_folder", str(checkpoint / ENGINE / SHARDS)]
    command += ["--output_folder", str(checkpoint / ENGINE / UNIVERSAL)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise CheckpointError(f"{checkpoint}: DeepSpeed could not convert its shards for another rank count: {last}")


def load(trainer: Trainer, checkpoint: Path, *, universal: bool) -> None:
    """Restore weights, optimiser, schedule and counters into a fresh Trainer; every rank has to call this."""
    if universal:
        if trainer.rank == 0:
            _make_universal(checkpoint)
        dist.barrier()
    hyperparameters = [
        {name: value for name, value in group.items() if name != "params"}
        for group in trainer.engine.basic_optimizer.param_groups
    ]
    tag = UNIVERSAL if universal else SHARDS
    with read_as_data(checkpoint):
        path, _ = trainer.engine.load_checkpoint(
            str(checkpoint / ENGINE), tag=tag, load_module_strict=not trainer.recipe.use_peft
        )
    if path is None:
        raise CheckpointError(f"{checkpoint}: DeepSpeed found no state under {ENGINE}/{tag}/")
    if universal:
        _repair_universal(trainer, hyperparameters)


def _repair_universal(trainer: Trainer, hyperparameters: list[dict]) -> None:
    """Undo two faults of DeepSpeed 0.19's universal loader under ZeRO-3: it gives every parameter group the first
    group's weight decay, and all of them one shared step counter, which then runs too fast."""
    optimizer = trainer.engine.basic_optimizer
    for group, own in zip(optimizer.param_groups, hyperparameters, strict=True):
        group.update({name: value for name, value in own.items() if name not in ("lr", "initial_lr")})
    for state in optimizer.state.values():
        if hasattr(state.get("step"), "clone"):
            state["step"] = state["step"].clone()
