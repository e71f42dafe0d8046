"""Training checkpoints: the model directory, DeepSpeed's engine state beside it, and the run's own state.

A checkpoint is written into a hidden partial directory. Its manifest comes last, and every file is read once more and
compared with it; then the directory is synced, renamed, named by LATEST, and old ones are removed. Each rank reads a share
of the files. A resumed run takes the newest checkpoint that equals its manifest.

Resuming on as many ranks as before restores DeepSpeed's shards as they are; on another number they go through its universal
format.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dfactory import faults
from dfactory.data.chat import read_chat_template
from dfactory.engine import distributed
from dfactory.engine.expert_parallel import WholeLayers
from dfactory.engine.runfolder import STATE, RunFolder, replace_text, writing
from dfactory.engine.shards import read_as_data
from dfactory.engine.trainer import Trainer
from dfactory.errors import CheckpointError
from dfactory.models.manifest import (
    MANIFEST,
    Manifest,
    hash_files,
    hash_problems,
    list_files,
    manifest_text,
    read_manifest,
    size_problems,
)
from dfactory.models.saving import save_policy
from dfactory.types import TrainState

ENGINE = "engine"  # the folder of what only a resumed run reads
SHARDS, UNIVERSAL = "shards", "universal"  # DeepSpeed's tags in it


def save(trainer: Trainer, folder: RunFolder, state: TrainState, keep: int | None) -> Path:
    """Write checkpoint-N of the step in `state`; every rank has to call this. Returns its path.

    Raises CheckpointError where the disk is full, or does not give back what was written; older checkpoints are then as
    they were.
    """
    partial = folder.path / f".checkpoint-{state.step}.partial"
    with writing(partial):
        if trainer.rank == 0:
            faults.at("checkpoint.begun")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        _write_model(trainer, partial)
        _write_shards(trainer, partial)
        if trainer.rank == 0:
            _write_state(trainer, state, partial)
        _write_manifest(partial)
        if problems := find_problems(partial):
            raise CheckpointError(f"{partial} is not what was written, check the disk: {'; '.join(problems)}")
        if trainer.rank == 0:
            faults.at("checkpoint.verified")
            folder.publish(partial, state.step)
            folder.remove_old(keep)
        dist.barrier()
    return folder.checkpoint(state.step)


def _write_model(trainer: Trainer, partial: Path) -> None:
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


def _write_shards(trainer: Trainer, partial: Path) -> None:
    faults.after_each_save(trainer.engine.checkpoint_engine, "shard")
    trainer.engine.save_checkpoint(str(partial / ENGINE), tag=SHARDS, save_latest=False, exclude_frozen_parameters=True)


def _write_state(trainer: Trainer, state: TrainState, partial: Path) -> None:
    shape = {
        "world_size": trainer.world_size,
        "zero_stage": trainer.zero_stage,
        "expert_parallel_size": trainer.recipe.expert_parallel_size,
    }
    replace_text(partial / STATE, json.dumps(dataclasses.asdict(state) | shape, indent=2) + "\n")


def _write_manifest(partial: Path) -> None:
    """Each rank hashes its share of the files, the first one writes the sums down."""
    names = distributed.on_first_rank(lambda: list_files(partial))
    parts = distributed.gather(hash_files(partial, _share(names)))
    if dist.get_rank() == 0:
        faults.at("manifest.hashed")
        manifest = {name: entry for part in parts for name, entry in part.items()}
        replace_text(partial / MANIFEST, manifest_text(manifest))
    dist.barrier()


def _share(names: list[str]) -> list[str]:
    """Of files by their size: every rank gets some of each size."""
    return names[dist.get_rank() :: dist.get_world_size()]


def find_problems(checkpoint: Path) -> list[str]:
    """How a checkpoint differs from its manifest, the same on all ranks, which have to call this together."""

    def read() -> tuple[Manifest, list[str]]:
        manifest = read_manifest(checkpoint)
        return manifest, size_problems(checkpoint, manifest)

    try:
        manifest, problems = distributed.on_first_rank(read)
    except CheckpointError as problem:
        return [str(problem)]
    if problems:
        return problems
    mine = hash_problems(checkpoint, {name: manifest[name] for name in _share(list(manifest))})
    return [problem for part in distributed.gather(mine) for problem in part]


def find_resume(folder: RunFolder, wanted: Any, overwrite: bool) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint that `resume_from_checkpoint` may mean, None to start anew; and a warning for each
    newer one that is damaged. All ranks call this together. Raises CheckpointError if there is no whole one."""
    candidates = distributed.on_first_rank(lambda: folder.resume_candidates(wanted, overwrite))
    return folder.first_whole(candidates, find_problems)


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
            shutil.rmtree(checkpoint / ENGINE / UNIVERSAL, ignore_errors=True)  # of a run that was killed meanwhile
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
