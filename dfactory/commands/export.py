"""`dfactory export`: a training checkpoint becomes a plain model directory, and what was written is read back and proved.

A full checkpoint is copied without its engine state; every tensor, loaded from the copy, is then bitwise the one of the
checkpoint, rounded where another precision was asked for. LoRA adapters are merged into their base; the result has to
differ from the base, and its scores on a fixed probe have to be those of base and adapters. The directory appears under
its name when all of this holds.
"""

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from transformers.core_model_loading import revert_weight_conversion

from dfactory.console import plain_console
from dfactory.data.pack import PackedDocument, collate
from dfactory.engine.runfolder import sync_tree
from dfactory.errors import CheckpointError, ConfigError
from dfactory.models.headers import INDEX, WEIGHTS, dtype_name, open_tensors, stored_dtype, weight_files
from dfactory.models.policy import Policy
from dfactory.models.registry import ADAPTER_CONFIG, adapter_base, load_policy, resolve_model_dir
from dfactory.models.saving import CHAT_TEMPLATE, GENERATION_CONFIG, carry_files, layer_groups, save_policy
from dfactory.types import AlignedDocument, TokenScores, ViewBatch
from dfactory.views import masked_view

TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}  # of a log-probability, after merging
PROBE_BLOCK, PROBE_LENGTH = 8, 64


def export(model: str, output: str, dtype: str = "auto") -> int:
    """Write `model` (checkpoint, or run folder: its newest checkpoint) as the plain model directory `output`.

    `dtype` is float32, bfloat16, or auto: the checkpoint's own, of adapters that of their base.
    Raises ConfigError if `output` is not free, CheckpointError if the checkpoint cannot be read or a proof fails; then
    nothing is left behind.
    """
    source = resolve_model_dir(model)
    wanted = None if dtype == "auto" else getattr(torch, dtype)

    def write(partial: Path) -> list[str]:
        if (source / ADAPTER_CONFIG).is_file():
            return merge_adapters(functools.partial(load_policy, source), source, partial, wanted)
        is_as_stored = wanted in (None, stored_dtype(source))
        return _copy_checkpoint(source, partial) if is_as_stored else _cast_checkpoint(source, partial, wanted)

    return write_proved(Path(output), str(source), write)


def write_proved(target: Path, named: str, write: Callable[[Path], list[str]]) -> int:
    """Let `write` fill a directory, which takes the name `target` when `write` has returned what it proved."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"--output {target} exists and is not an empty directory: give a new one")
    with _appears_whole(target) as partial:
        proofs = write(partial)
    console = plain_console(soft_wrap=True)
    for proof in proofs:
        console.print(proof)
    console.print(f"{named} is now {target}: {', '.join(sorted(file.name for file in target.iterdir()))}")
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
    carry_files(source, partial)
    # weights that the checkpoint does not read (those of another format, or left over) are not part of it
    weights = weight_files(source)
    for file in weights if weights == [source / WEIGHTS] else [*weights, source / INDEX]:
        shutil.copyfile(file, partial / file.name)
    return [prove_copy(source, partial)]


def prove_copy(source: Path, partial: Path) -> str:
    """Load what was written; raises CheckpointError unless every tensor is bitwise that of the source."""
    dtype = stored_dtype(source)
    count = _require_same_tensors(load_policy(partial, dtype=dtype), open_tensors(source))
    return f"copied and loaded again: {count} tensors ({dtype_name(dtype)}) equal the checkpoint's bit by bit"


def _cast_checkpoint(source: Path, partial: Path, dtype: torch.dtype) -> list[str]:
    save_policy(load_policy(source, dtype=dtype), partial)
    count = _require_same_tensors(load_policy(partial, dtype=dtype), open_tensors(source))
    was = dtype_name(stored_dtype(source))
    return [f"cast and loaded again: {count} tensors ({dtype_name(dtype)}) are the checkpoint's, rounded from {was}"]


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
    """How one model directory differs from another."""

    tensors: int  # that differ
    largest: float
    name: str  # of the tensor that holds the largest difference


def merge_adapters(
    read: Callable[[torch.dtype], Policy], source: Path, partial: Path, dtype: torch.dtype | None = None
) -> list[str]:
    """Merge the adapters of the policy that `read(dtype=...)` gives into their base, into `partial`, rounded to `dtype`
    where one is given; `source` is where they lie. Returns the proofs, raises CheckpointError where one fails."""
    base_dir = adapter_base(source)
    stored = stored_dtype(base_dir)
    dtype = dtype or stored
    adapted = read(dtype=stored)
    probe = probe_batch(adapted.config.vocab_size)
    wanted = _score(adapted, probe)
    with adapted.model.disable_adapter():
        moved = float((_score(adapted, probe).logprob_N - wanted.logprob_N).abs().max())
    _write_merged(adapted, source, partial, dtype)
    del adapted  # one model in memory at a time
    change = compare(base_dir, partial)
    if not change.tensors:
        raise CheckpointError(
            f"the merged model equals its base {base_dir} in every tensor: the adapters are untrained, or too small to "
            "survive rounding; train them first"
        )
    difference = _require_same_scores(load_policy(partial, dtype=dtype), probe, wanted, dtype)
    return [
        f"merged {source} into {base_dir}: {change.tensors} tensors changed, most of all {change.name}, by up to "
        f"{change.largest:.3g}",
        f"loaded again ({dtype_name(dtype)}): log-probabilities of {probe.num_targets} targets equal those of base and "
        f"adapters within {difference:.2g} (allowed: {TOLERANCE[dtype]:g}); the adapters move them by up to {moved:.2g}",
    ]


def _write_merged(adapted: Policy, source: Path, partial: Path, dtype: torch.dtype) -> None:
    try:
        merged = adapted.model.merge_and_unload(safe_merge=True)
    except ValueError as problem:  # peft found a NaN
        raise CheckpointError(f"{source} cannot be merged: {problem}") from problem
    for name in (GENERATION_CONFIG, CHAT_TEMPLATE):  # before the base's own are carried along: these are as trained
        if (source / name).is_file():
            shutil.copyfile(source / name, partial / name)
    save_policy(Policy(merged.to(dtype), source_dir=adapted.source_dir), partial)


def compare(before: Path, after: Path) -> Change:
    """The tensors that two model directories share, in the precision of the second, one at a time."""
    old, new = open_tensors(before), open_tensors(after)
    changed, largest, where = 0, 0.0, ""
    for name in sorted(set(old) & set(new)):
        is_now = new[name].get_tensor(name)
        difference = old[name].get_tensor(name).to(is_now.dtype).double() - is_now.double()
        furthest = float(difference.abs().max())
        changed += furthest > 0
        if furthest > largest:
            largest, where = furthest, name
    return Change(changed, largest, where)


def probe_batch(vocab_size: int) -> ViewBatch:
    """One document of random tokens with one view of its second half: the same for every model of that vocabulary."""
    rng = np.random.default_rng(0)
    ids_T = rng.integers(0, vocab_size, PROBE_LENGTH, dtype=np.int32)
    position_P = np.arange(PROBE_LENGTH // 2, PROBE_LENGTH, dtype=np.int32)
    masked_P = rng.random(len(position_P)) < 0.5
    trainable_T = np.arange(PROBE_LENGTH) >= PROBE_LENGTH // 2
    document = AlignedDocument(0, ids_T, trainable_T, PROBE_BLOCK)
    view = masked_view(document, position_P, masked_P, np.full(len(position_P), 0.5), mask_id=vocab_size - 1)
    return collate([[PackedDocument(document, [view])]], PROBE_BLOCK)


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
