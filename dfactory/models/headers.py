"""Checks that a model directory has the tensors that its config.json requires, by their original names.

Read from the headers of the safetensors files, before any weight is: a directory that does not fit is refused at once,
and the message names the tensors as their author wrote them, not as transformers renames and merges them.
"""

import json
import math
import re
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from dfactory.errors import CheckpointError
from dfactory.models.families.base import FAMILIES
from dfactory.models.manifest import check_sizes

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors spells them

SHOWN = 8  # problems that a message spells out
MOST_HEADER_BYTES = 16 * 2**20  # of all weight files together: some 150,000 tensors; the 100B model has 25,000
MOST_INDEX_BYTES = 16 * 2**20

_LAYER = re.compile(r"\b(?:layers|blocks)\.(\d{1,9})\.")
_EXPERT = re.compile(r"\bexperts\.(\d{1,9})\.")

Shapes = dict[str, tuple[int, ...]]


def weight_files(model_dir: Path) -> list[Path]:
    """model.safetensors, or the shards that its index names. Raises CheckpointError if there is neither, or a gap."""
    whole, index = model_dir / WEIGHTS, model_dir / INDEX
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise CheckpointError(
            f"{model_dir} holds neither {WEIGHTS} nor {INDEX}: weights are read from safetensors only; "
            "to start from random weights set init_weights=random"
        )
    if index.stat().st_size > MOST_INDEX_BYTES:
        raise CheckpointError(f"{index} has {index.stat().st_size:,} bytes: an index has {MOST_INDEX_BYTES:,} at most")
    try:
        names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise CheckpointError(f"{index} is not an index of safetensors files: {problem!r}") from problem
    for name in names:
        if not is_plain_name(name):
            raise CheckpointError(
                f"{index} names {name!r}: weights lie beside their index, so give file names without a path"
            )
    absent = [name for name in names if not (model_dir / name).is_file()]
    if absent:
        raise CheckpointError(f"{model_dir} lacks {', '.join(absent)}, which {INDEX} names")
    return [model_dir / name for name in names]


def is_plain_name(name: str) -> bool:
    """Whether this is the name of something within a directory, and leads nowhere else."""
    return name == Path(name).name and name not in ("", "..")


def read_shapes(model_dir: Path) -> Shapes:
    """Name -> shape of every tensor in the weight files. Raises CheckpointError that names a broken file."""
    shapes: Shapes = {}
    files = weight_files(model_dir)
    check_sizes(model_dir, [file.name for file in files])
    refuse_large_headers(files)
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as problem:
            raise CheckpointError(f"{file} is not a whole safetensors file: {problem}; copy it again") from problem
    return shapes


def refuse_large_headers(files: list[Path]) -> None:
    """Raise CheckpointError where headers name more tensors than any model has, without reading them."""
    total = 0
    for file in files:
        with file.open("rb") as stream:
            stated = int.from_bytes(stream.read(8), "little")  # the length of the header: so a file begins
        total += stated if stated <= file.stat().st_size else 0  # safetensors refuses one that is cut short
        if total > MOST_HEADER_BYTES:
            raise CheckpointError(
                f"{file} states a header of {total:,} bytes: those of a model have {MOST_HEADER_BYTES:,} at most, all "
                "files together; it is damaged, or no model"
            )


def check_counts(model_dir: Path, found: Shapes, layers: int, experts: int) -> None:
    """Raise CheckpointError where config.json states more layers or experts than the files hold: before a model of that
    size is built. `experts` counts where experts are stored one by one."""
    for what, pattern, stated in (("num_hidden_layers", _LAYER, layers), ("num_experts", _EXPERT, experts)):
        stored = {match[1] for name in found if (match := pattern.search(name))}
        if stored and stated > len(stored):
            raise CheckpointError(
                f"{model_dir} does not fit its config.json: {what} is {stated:,}, but the weights hold {len(stored):,}"
            )


def open_tensors(model_dir: Path) -> dict[str, safe_open]:
    """Name -> the open file that holds the tensor; nothing is read yet."""
    files = [safe_open(file, framework="pt") for file in weight_files(model_dir)]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118


def stored_dtype(model_dir: Path) -> torch.dtype:
    """The precision that holds most of the elements of a model directory. Raises CheckpointError for another than
    float32, bfloat16 and float16."""
    shapes, sizes = read_shapes(model_dir), {}
    for name, file in open_tensors(model_dir).items():
        spelt = file.get_slice(name).get_dtype()
        sizes[spelt] = sizes.get(spelt, 0) + math.prod(shapes[name])
    spelt = max(sizes, key=sizes.get)
    if spelt not in DTYPES:
        raise CheckpointError(f"{model_dir} holds {spelt} tensors: only {', '.join(DTYPES)} can be read")
    return DTYPES[spelt]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_shapes(model_dir: Path, found: Shapes, model: PreTrainedModel) -> None:
    """Raise CheckpointError unless `found` is what `model` saves; tied tensors may be there or not.

    `model` may live on the meta device; its own weight conversions say under which names it saves.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in original_tensors(model).items()}
    tied = set(original_tensors(model, getattr(model, "all_tied_weights_keys", None) or ()))
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    problems = [f"missing tensor {name} {list(expected[name])}" for name in sorted(set(expected) - set(found) - tied)]
    problems += [
        f"unexpected tensor {name} {list(found[name])}"
        for name in sorted(set(found) - set(expected) - tied)
        if not any(pattern.search(name) for pattern in ignored)
    ]
    problems += [
        f"tensor {name} has shape {list(found[name])}, not {list(expected[name])}"
        for name in sorted(set(found) & set(expected))
        if found[name] != expected[name]
    ]
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckpointError(f"{model_dir} does not fit its config.json: {'; '.join(problems[:SHOWN])}{more}")


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without weights: names and shapes on the meta device, at no cost in memory.

    Made by its class and not by from_config, which would shard it where ZeRO-3 is on.
    """
    with torch.device("meta"):
        return FAMILIES.variant_of(config).model_class(config)


def original_tensors(model: PreTrainedModel, names: Collection[str] | None = None) -> dict:
    """The state dict, or the tensors of these `names` in the model, under the names in which the model is saved."""
    tensors = {n: t for n, t in model.state_dict().items() if names is None or n in names}
    return revert_weight_conversion(model, tensors)
