"""Training checkpoints: the model directory, DeepSpeed's engine state in it, and the run's own state.

A checkpoint is written into a hidden partial directory. The manifest is written last, and every file is read again and
compared with it. Then the directory is synced and renamed, LATEST is updated, and old checkpoints are removed. Each rank
reads a share of the files. A resumed run takes the newest checkpoint that matches its manifest.

Resuming on the same number of ranks restores DeepSpeed's shards as they are. On another number they are converted to
DeepSpeed's universal format first.
"""

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
import yaml

from dfactory import distributed, faults
from dfactory.config.resume import LIMITED, Change, changes_between, refuse_kept
from dfactory.data.named_templates import read_chat_template
from dfactory.engine.expert_parallel import WholeLayers
from dfactory.engine.shards import absent_shards, read_as_data
from dfactory.engine.trainer import Trainer
from dfactory.errors import CheckpointError, ConfigError
from dfactory.models.manifest import (
    MANIFEST,
    Manifest,
    hash_files,
    hash_problems,
    list_files,
    list_problems,
    manifest_text,
    read_manifest,
    size_problems,
)
from dfactory.models.registry import known_mask_id
from dfactory.models.saving import save_policy
from dfactory.recipe import Recipe
from dfactory.runs.folder import RECIPE, STATE, RunFolder, recipe_of, recipe_text, replace_text, writing
from dfactory.runs.lineage import FILE as LINEAGE
from dfactory.types import WHOLE, TrainState

ENGINE = "engine"  # the folder that only a resumed run reads
SHARDS, UNIVERSAL = "shards", "universal"  # DeepSpeed's tags
CONVERTED = ".converted"  # in output_dir while a run resumes: shards in the universal format


def save(trainer: Trainer, folder: RunFolder, state: TrainState, keep: int | None, lineage: str | None = None) -> Path:
    """Write checkpoint-N of the step in `state`; every rank must call this. Returns its path. `lineage` is the text of its
    dfactory.json, on the first rank.

    Raises CheckpointError if the disk is full, or if a file does not read back as it was written. Older checkpoints are
    then untouched.
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
            if lineage is not None:
                replace_text(partial / LINEAGE, lineage)
        _write_manifest(partial)
        if problems := find_problems(partial):
            raise CheckpointError(f"{partial} does not read back as written, check the disk: {'; '.join(problems)}")
        if trainer.rank == 0:
            faults.at("checkpoint.verified")
            folder.publish(partial, state.step)
            recipe = trainer.recipe
            folder.remove_old(keep, recipe.metric_for_best_model, recipe.smaller_is_better)
        dist.barrier()
    return folder.checkpoint(state.step)


def _write_model(trainer: Trainer, partial: Path) -> None:
    with trainer.averaged():
        save_policy(
            trainer.policy,
            partial,
            gathered=trainer.gathered,
            whole_layer=WholeLayers(trainer.policy, keep=trainer.rank == 0),
            write=trainer.rank == 0,
            block_size=WHOLE if trainer.recipe.block_size is None else trainer.recipe.block_size,
            mask_token_id=trainer.recipe.mask_token_id,
            chat_template=read_chat_template(trainer.recipe.chat_template_path),
        )


def _write_shards(trainer: Trainer, partial: Path) -> None:
    faults.after_each_save(trainer.engine.checkpoint_engine, "shard")
    trainer.engine.save_checkpoint(str(partial / ENGINE), tag=SHARDS, save_latest=False, exclude_frozen_parameters=True)
    if trainer.average is not None:
        trainer.average.save(partial / ENGINE)


def _write_state(trainer: Trainer, state: TrainState, partial: Path) -> None:
    shape = {
        "world_size": trainer.world_size,
        "zero_stage": trainer.zero_stage,
        "expert_parallel_size": trainer.recipe.expert_parallel_size,
    }
    replace_text(partial / RECIPE, recipe_text(trainer.recipe))
    replace_text(partial / STATE, json.dumps(dataclasses.asdict(state) | shape, indent=2) + "\n")


def _write_manifest(partial: Path) -> None:
    """Each rank hashes its share of the files; the first rank writes the manifest."""
    names = distributed.on_first_rank(lambda: list_files(partial))
    parts = distributed.gather(hash_files(partial, _share(names)))
    if dist.get_rank() == 0:
        faults.at("manifest.hashed")
        manifest = {name: entry for part in parts for name, entry in part.items()}
        replace_text(partial / MANIFEST, manifest_text(manifest))
    dist.barrier()


def _share(names: list[str]) -> list[str]:
    """This rank's share of files that are sorted by size, so that every rank gets some of each size."""
    return names[dist.get_rank() :: dist.get_world_size()]


def find_problems(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint: files that differ from the manifest, or that a run needs and it does not list.

    All ranks must call this together and get the same answer.
    """

    def read() -> tuple[Manifest, list[str]]:
        manifest = read_manifest(checkpoint)
        return manifest, size_problems(checkpoint, manifest) or list_problems(checkpoint, manifest)

    try:
        manifest, problems = distributed.on_first_rank(read)
        if problems:
            return problems
        mine = hash_problems(checkpoint, {name: manifest[name] for name in _share(list(manifest))})
        if problems := [problem for part in distributed.gather(mine) for problem in part]:
            return problems
        return distributed.on_first_rank(lambda: _state_problems(checkpoint, manifest))
    except CheckpointError as problem:
        return [str(problem)]


def problems_without_reading(checkpoint: Path) -> list[str]:
    """The same on one rank, without the checks that read whole files."""
    try:
        manifest = read_manifest(checkpoint)
        problems = size_problems(checkpoint, manifest) or list_problems(checkpoint, manifest)
        return problems or _state_problems(checkpoint, manifest)
    except CheckpointError as problem:
        return [str(problem)]


def _state_problems(checkpoint: Path, manifest: Manifest) -> list[str]:
    """Parts of the run's state that the manifest does not list. Raises CheckpointError if a listed one is invalid."""
    if STATE not in manifest:
        return [f"the manifest lists no {STATE}"]
    shape = _read_shape(checkpoint)
    read_state(checkpoint)
    absent = [] if shape.expert_parallel_size > 1 else absent_shards(manifest, shape.world_size, shape.zero_stage)
    return [f"the manifest lists no {name}" for name in absent]


def find_resume(folder: RunFolder, wanted: Any, overwrite: bool) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint that `resume_from_checkpoint` allows, or None for a fresh start; and a warning for each
    newer one that is damaged. All ranks call this together. Raises CheckpointError if none is whole."""
    candidates = distributed.on_first_rank(lambda: folder.resume_candidates(wanted, overwrite))
    return folder.first_whole(candidates, find_problems)


class Shape(NamedTuple):
    """How a checkpoint is split into shards."""

    world_size: int
    zero_stage: int
    expert_parallel_size: int


def read_state(checkpoint: Path) -> TrainState:
    """The run's state in a checkpoint. Raises CheckpointError if it is missing or invalid."""
    raw = _read_raw(checkpoint)
    fields = {field.name: field.default for field in dataclasses.fields(TrainState)}
    numbers = {name: raw.get(name, default) for name, default in fields.items() if name != "source"}
    _require_counts(checkpoint, numbers)
    if not isinstance(raw.get("source"), dict):
        raise CheckpointError(f"{checkpoint / STATE} has no data cursor (source)")
    return TrainState(**numbers, source=raw["source"])


def _read_shape(checkpoint: Path) -> Shape:
    raw = _read_raw(checkpoint)
    numbers = {name: raw.get(name) for name in Shape._fields}
    _require_counts(checkpoint, numbers)
    return Shape(**numbers)


def _read_raw(checkpoint: Path) -> dict[str, Any]:
    try:
        raw = json.loads((checkpoint / STATE).read_bytes())
    except (OSError, ValueError, RecursionError) as problem:
        raise CheckpointError(f"{checkpoint / STATE} cannot be read: {problem}") from problem
    if not isinstance(raw, dict):
        raise CheckpointError(f"{checkpoint / STATE} is not a JSON object")
    return raw


def _require_counts(checkpoint: Path, numbers: dict[str, Any]) -> None:
    for name, value in numbers.items():
        if type(value) is not int or value < 0:
            raise CheckpointError(f"{checkpoint / STATE}: {name} is {value!r}, not a count")


@dataclasses.dataclass(frozen=True)
class Resumed:
    """A checkpoint from which a run continues."""

    path: Path
    state: TrainState
    recipe: str  # the recipe that it was trained by; "" if it is unknown
    changes: list[Change]  # keys that differ in the run's recipe

    @property
    def other_recipe(self) -> str | None:
        """The recipe up to this checkpoint, if the run continues with another one."""
        return self.recipe if self.changes else None

    @property
    def summary(self) -> str:
        """Which keys have changed."""
        if not self.recipe:
            return "changed keys are unknown: it holds no recipe"
        return f"changed since: {'; '.join(map(str, self.changes)) or 'no key'}"

    def __str__(self) -> str:
        return f"resumed from {self.path}; {self.summary}"

    @contextlib.contextmanager
    def naming_changes(self) -> Iterator[None]:
        """A context that adds the changed keys to a CheckpointError, because they may be why the cursor does not fit."""
        try:
            yield
        except CheckpointError as problem:
            if not (suspects := [str(change) for change in self.changes if change.key in LIMITED]):
                raise
            raise CheckpointError(f"{problem}; changed since the checkpoint: {'; '.join(suspects)}") from problem


def resume_from(path: Path, recipe: Recipe) -> Resumed:
    """The checkpoint to continue from, with the keys that changed since.

    Raises ConfigError if the recipe changes a key that must not change, or asks for fewer steps than are done.
    """
    state = read_state(path)
    if recipe.max_steps is not None and recipe.max_steps < state.step:
        raise ConfigError(
            f"max_steps {recipe.max_steps}, but {path} has done {state.step}: raise it, or resume from an earlier checkpoint"
        )
    file = recipe_of(path)
    text = file.read_text() if file is not None else ""
    changes = changes_between(_keys(text, file), _keys(recipe_text(recipe))) if file is not None else []
    refuse_kept(changes, path)
    return Resumed(path, state, text, changes)


def refuse_other_mask(checkpoint: Path, mask_id: int) -> None:
    """Raise ConfigError where a checkpoint was trained with another mask than the recipe's `mask_token` stands for now."""
    recorded = known_mask_id(checkpoint, None)
    if recorded not in (None, mask_id):
        raise ConfigError(
            f"mask_token stands for {mask_id} now, and {checkpoint} was trained with {recorded}: the tokenizer or the chat "
            "template has changed; put the former one back, or start a new run from its weights with model_name_or_path"
        )


def _keys(text: str, file: Path | None = None) -> dict[str, Any]:
    try:
        keys = yaml.safe_load(text)
    except yaml.YAMLError as problem:
        raise CheckpointError(f"{file} is not YAML: {problem}") from problem
    if not isinstance(keys, dict) or not isinstance(keys.get("decode", {}), dict):
        raise CheckpointError(f"{file} holds no recipe")
    return keys


def needs_universal(checkpoint: Path, recipe_stage: int, world_size: int, expert_parallel_size: int) -> bool:
    """Whether the shards have to be converted for this number of ranks. Raises CheckpointError if that is impossible."""
    shape = _read_shape(checkpoint)
    if shape.zero_stage != recipe_stage:
        raise CheckpointError(
            f"{checkpoint} was written with ZeRO {shape.zero_stage}, the recipe has {recipe_stage}: resume with "
            f"ZeRO {shape.zero_stage}"
        )
    if shape.expert_parallel_size != expert_parallel_size:
        raise CheckpointError(
            f"{checkpoint} was written with expert_parallel_size {shape.expert_parallel_size}, the recipe has "
            f"{expert_parallel_size}: resume with {shape.expert_parallel_size}, or start a new run from its weights with "
            "model_name_or_path"
        )
    if expert_parallel_size > 1 and shape.world_size != world_size:
        raise CheckpointError(
            f"{checkpoint} was written on {shape.world_size} ranks, there are {world_size} now, and with "
            f"expert_parallel_size {expert_parallel_size} their number must stay the same: resume on "
            f"{shape.world_size} ranks, or start a new run from its weights with model_name_or_path"
        )
    return recipe_stage > 0 and shape.world_size != world_size


def refuse_resharding(checkpoint: Path, optim: str) -> None:
    """Raise CheckpointError for an optimiser whose state belongs to the ranks that wrote it. Called where the number of
    ranks has changed."""
    reasons = {
        "adamw_8bit": "its moments are scaled in blocks of a rank's shard",
        "muon": "its momentum is kept with a rank's shard",
    }
    if optim in reasons:
        ranks = _read_shape(checkpoint).world_size
        raise CheckpointError(
            f"{checkpoint} was written on {ranks} ranks with optim {optim}, and {reasons[optim]}: resume on {ranks} ranks, "
            "or start a new run from its weights with model_name_or_path"
        )


def _make_universal(checkpoint: Path, target: Path) -> None:
    """Convert DeepSpeed's shards into a folder of this run, because the checkpoint may belong to another run or lie on a
    read-only disk. Raises CheckpointError with the converter's last line of output."""
    shutil.rmtree(target.parent, ignore_errors=True)  # left by a run that was killed while it converted
    command = [sys.executable, "-m", "dfactory.engine.shards", "--inject_missing_state"]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    command += ["--input_folder", str(checkpoint / ENGINE / SHARDS), "--output_folder", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        shutil.rmtree(target.parent, ignore_errors=True)
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise CheckpointError(f"{checkpoint}: DeepSpeed could not convert its shards for another rank count: {last}")


def load(trainer: Trainer, checkpoint: Path, *, universal: bool) -> None:
    """Restore weights, the optimiser's moments and counters into a fresh Trainer; every rank must call this.

    DeepSpeed also loads the checkpoint's hyperparameters; those of the recipe replace them.
    """
    shards = checkpoint / ENGINE / SHARDS
    if universal:
        shards = Path(trainer.recipe.output_dir) / CONVERTED / UNIVERSAL
        distributed.on_first_rank(lambda: _make_universal(checkpoint, shards))
    with read_as_data(checkpoint), _reading(checkpoint), trainer.own_hyperparameters():
        path, _ = trainer.engine.load_checkpoint(
            str(shards.parent),
            tag=shards.name,
            load_module_strict=not (trainer.recipe.use_peft or trainer.recipe.frozen_parameters),
            load_lr_scheduler_states=False,
        )
    if path is None:
        raise CheckpointError(f"{checkpoint}: DeepSpeed found no state in {shards}")
    if universal:
        _part_step_counters(trainer)
        dist.barrier()
        distributed.on_first_rank(lambda: shutil.rmtree(shards.parent))
    if trainer.average is not None:
        trainer.average.load(checkpoint / ENGINE)
    with _reading(checkpoint):
        trainer.go_to(read_state(checkpoint).step)


@contextlib.contextmanager
def _reading(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as problem:
        raise CheckpointError(
            f"{problem.filename} of {checkpoint} is gone: is another run writing there and removing old checkpoints "
            "(save_total_limit)? Resume from a newer one"
        ) from problem


def _part_step_counters(trainer: Trainer) -> None:
    """Give every parameter its own step counter. DeepSpeed 0.19's universal loader shares one between all parameters under
    ZeRO-3, so that it advances once for each of them."""
    for state in trainer.engine.basic_optimizer.state.values():
        if hasattr(state.get("step"), "clone"):
            state["step"] = state["step"].clone()
