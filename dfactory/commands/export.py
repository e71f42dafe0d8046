"""`dfactory export`: a training checkpoint becomes a plain model directory, and what was written is read back and proved.

A full checkpoint is copied without its engine state; every tensor, loaded from the copy, is then bitwise the one of the
checkpoint. LoRA adapters are merged into their base; the result has to differ from the base, and its scores on a fixed
probe have to be those of base and adapters. The directory appears under its name when all of this holds.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from safetensors import safe_open
from transformers.core_model_loading import revert_weight_conversion

from dfactory.data.pack import PackedDocument, collate
from dfactory.engine.runfolder import sync_tree
from dfactory.errors import CheckpointError, ConfigError
from dfactory.models.headers import read_shapes, weight_files
from dfactory.models.policy import Policy
from dfactory.models.registry import ADAPTER_CONFIG, load_policy, resolve_model_dir
from dfactory.models.saving import GENERATION_CONFIG, layer_groups, save_policy
from dfactory.types import TokenScores, ViewBatch
from dfactory.views import masked_view

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors spells them
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}  # of a log-probability, after merging
PROBE_BLOCK, PROBE_LENGTH = 8, 64


def export(model: str, output: str) -> int:
    """Write `model` (checkpoint, or run folder: its newest checkpoint) as the plain model directory `output`.

    Raises ConfigError if `output` is not free, CheckpointError if the checkpoint cannot be read or a proof fails; then
    nothing is left behind.
    """
    source, target = resolve_model_dir(model), Path(output)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"--output {target} exists and is not an empty directory: give a new one")
    with _appears_whole(target) as partial:
        is_adapter = (source / ADAPTER_CONFIG).is_file()
        proofs = _merge_adapters(source, partial) if is_adapter else _copy_checkpoint(source, partial)
    console = Console(highlight=False, soft_wrap=True)
    for proof in proofs:
        console.print(proof)
    console.print(f"{source} is now {target}: {', '.join(sorted(file.name for file in target.iterdir()))}")
    return 0


@contextlib.contextmanager
def _appears_whole(target: Path) -> Iterator[Path]:
    """A hidden sibling to write into, which takes the name `target` at the end, or vanishes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.resolve().with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        sync_tree(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# --- full checkpoints -------------------------------------------------------------------------------------------------


def _copy_checkpoint(source: Path, partial: Path) -> list[str]:
    weights = {file.name for file in weight_files(source)}
    for file in sorted(source.iterdir()):
        # weights that the checkpoint does not read (those of another format, or left over) are not part of it
        if file.is_file() and (file.name in weights or file.suffix not in (".safetensors", ".bin", ".pt")):
            shutil.copyfile(file, partial / file.name)
    dtype = stored_dtype(source)
    count = _require_same_tensors(load_policy(partial, dtype=dtype), _open_tensors(source))
    return [f"copied and loaded again: {count} tensors ({dtype_name(dtype)}) equal the checkpoint's bit by bit"]


def _require_same_tensors(policy: Policy, stored: dict[str, safe_open]) -> int:
    """Compare a loaded policy with stored tensors, a layer at a time. Returns how many there are."""
    count = 0
    for group in layer_groups(policy.model):
        for name, loaded in revert_weight_conversion(policy.model, dict(group)).items():
            original = stored[name].get_tensor(name)
            if not torch.equal(_bits(original.to(loaded.dtype)), _bits(loaded.detach())):
                raise CheckpointError(f"{name} came back differently from the copy: check the disk, then export again")
            count += 1
    return count


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes, so that equal NaNs are equal too."""
    return tensor.contiguous().flatten().view(torch.uint8)


# --- adapters ---------------------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """How a merged model differs from its base."""

    tensors: int
    largest: float
    name: str  # of the tensor that holds the largest difference


def _merge_adapters(source: Path, partial: Path) -> list[str]:
    base_dir = _base_of(source)
    dtype = stored_dtype(base_dir)
    adapted = load_policy(source, dtype=dtype)
    probe = probe_batch(adapted.config.vocab_size)
    wanted = _score(adapted, probe)
    with adapted.model.disable_adapter():
        moved = float((_score(adapted, probe).logprob_N - wanted.logprob_N).abs().max())
    _write_merged(adapted, source, partial)
    del adapted  # one model in memory at a time
    change = _require_changed(base_dir, partial)
    difference = _require_same_scores(load_policy(partial, dtype=dtype), probe, wanted, dtype)
    return [
        f"merged {source} into {base_dir}: {change.tensors} tensors changed, most of all {change.name}, by up to "
        f"{change.largest:.3g}",
        f"loaded again ({dtype_name(dtype)}): log-probabilities of {probe.num_targets} targets equal those of base and "
        f"adapters within {difference:.2g} (allowed: {TOLERANCE[dtype]:g}); the adapters move them by up to {moved:.2g}",
    ]


def _base_of(adapter_dir: Path) -> Path:
    base = json.loads((adapter_dir / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
    if not Path(base).is_dir():
        raise CheckpointError(
            f"base_model_name_or_path {base} in {adapter_dir / ADAPTER_CONFIG} is not a directory: adapters are merged "
            "into their base; put it back, or correct the path there"
        )
    return Path(base)


def _write_merged(adapted: Policy, source: Path, partial: Path) -> None:
    try:
        merged = adapted.model.merge_and_unload(safe_merge=True)
    except ValueError as problem:  # peft found a NaN
        raise CheckpointError(f"{source} cannot be merged: {problem}") from problem
    if (source / GENERATION_CONFIG).is_file():  # before the base's own is carried along: this one has the block size
        shutil.copyfile(source / GENERATION_CONFIG, partial / GENERATION_CONFIG)
    save_policy(Policy(merged, source_dir=adapted.source_dir), partial)


def _require_changed(base_dir: Path, merged_dir: Path) -> Change:
    """The written tensors against those of the base, one at a time. Raises CheckpointError if all are the same."""
    base, merged = _open_tensors(base_dir), _open_tensors(merged_dir)
    changed, largest, where = 0, 0.0, ""
    for name in sorted(set(base) & set(merged)):
        difference = base[name].get_tensor(name).double() - merged[name].get_tensor(name).double()
        furthest = float(difference.abs().max())
        changed += furthest > 0
        if furthest > largest:
            largest, where = furthest, name
    if not changed:
        raise CheckpointError(
            f"the merged model equals its base {base_dir} in all {len(merged)} tensors: the adapters are untrained, or "
            "too small to survive rounding; train them first"
        )
    return Change(changed, largest, where)


def probe_batch(vocab_size: int) -> ViewBatch:
    """One document of random tokens with one view of its second half: the same for every model of that vocabulary."""
    rng = np.random.default_rng(0)
    ids_T = rng.integers(0, vocab_size, PROBE_LENGTH, dtype=np.int32)
    position_P = np.arange(PROBE_LENGTH // 2, PROBE_LENGTH, dtype=np.int32)
    masked_P = rng.random(len(position_P)) < 0.5
    view = masked_view(ids_T, position_P, masked_P, np.full(len(position_P), 0.5), mask_id=vocab_size - 1)
    trainable_T = np.arange(PROBE_LENGTH) >= PROBE_LENGTH // 2
    return collate([[PackedDocument(0, ids_T, trainable_T, [view])]], PROBE_BLOCK)


@torch.no_grad()
def _score(policy: Policy, batch: ViewBatch) -> TokenScores:
    return policy.eval().score(batch)


def _require_same_scores(policy: Policy, probe: ViewBatch, wanted: TokenScores, dtype: torch.dtype) -> float:
    difference = float((_score(policy, probe).logprob_N - wanted.logprob_N).abs().max())
    if not difference <= TOLERANCE[dtype]:  # a NaN is not
        raise CheckpointError(
            f"the merged model's log-probabilities are {difference:.3g} away from those of base and adapters, in "
            f"{dtype_name(dtype)} {TOLERANCE[dtype]:g} is allowed: nothing was exported"
        )
    return difference


# --- tensors on disk --------------------------------------------------------------------------------------------------


def _open_tensors(model_dir: Path) -> dict[str, safe_open]:
    """Name -> the open file that holds the tensor; nothing is read yet."""
    files = [safe_open(file, framework="pt") for file in weight_files(model_dir)]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118


def stored_dtype(model_dir: Path) -> torch.dtype:
    """The precision that holds most of the elements of a model directory. Raises CheckpointError for another than
    float32, bfloat16 and float16."""
    shapes, sizes = read_shapes(model_dir), {}
    for name, file in _open_tensors(model_dir).items():
        spelt = file.get_slice(name).get_dtype()
        sizes[spelt] = sizes.get(spelt, 0) + int(np.prod(shapes[name]))
    spelt = max(sizes, key=sizes.get)
    if spelt not in DTYPES:
        raise CheckpointError(f"{model_dir} holds {spelt} tensors: export reads {', '.join(DTYPES)}")
    return DTYPES[spelt]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
