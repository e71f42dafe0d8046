"""Top-k merge: the arithmetic mean of checkpoints of one run (docs/method.md#merging).

Of full checkpoints the tensors are averaged, one at a time, in float32, and written in place into a copy of the first
checkpoint's files: the same shards, index, names and precision. Of LoRA adapters the products are averaged, exactly: the
mean of K products B_i A_i is one adapter of K times the rank, [B_1 .. B_K] times [A_1; ..; A_K] / K. Means of the
factors would be another model.
"""

import json
import shutil
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open

from dfactory.errors import CheckpointError
from dfactory.models.adapters import adapter_base, check_adapters
from dfactory.models.headers import DTYPES, INDEX, WEIGHTS, open_tensors, read_shapes, weight_files
from dfactory.models.policy import Policy
from dfactory.models.registry import load_policy

MEAN = "mean"  # the name of the averaged adapter


# --- whole weights ----------------------------------------------------------------------------------------------------


def average_weights(model_dirs: Sequence[Path], target: Path) -> None:
    """Write the mean of the directories' tensors into `target`, in files laid out as those of the first directory.

    Raises CheckpointError where another directory holds other names, shapes or precisions, where all of them hold the
    same numbers, and for a mean that is not finite.
    """
    _require_same_layout(model_dirs)
    first, stored = model_dirs[0], [open_tensors(directory) for directory in model_dirs]
    if len(model_dirs) > 1 and not _differ(stored):
        raise CheckpointError(
            f"{' and '.join(map(str, model_dirs))} hold the same numbers: there is nothing to average"
        )
    for file in weight_files(first):
        copy = Path(shutil.copyfile(file, target / file.name))
        with copy.open("r+b") as stream:
            for name, start in _places(file).items():
                mean = mean_tensor(tensors[name].get_tensor(name) for tensors in stored)
                if not mean.isfinite().all():
                    raise CheckpointError(f"the mean of {name} is not finite: leave the broken checkpoint out")
                stream.seek(start)
                stream.write(mean.flatten().view(torch.uint8).numpy())
    if not (target / WEIGHTS).is_file():
        shutil.copyfile(first / INDEX, target / INDEX)


def mean_tensor(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """The mean of tensors that come one by one, summed in float32 and given back in their own precision."""
    total, count = None, 0
    for tensor in tensors:
        total = tensor.to(torch.float32, copy=True) if total is None else total.add_(tensor)
        count += 1
    return total.div_(count).to(tensor.dtype)


def _places(file: Path) -> dict[str, int]:
    """Name -> offset of the first byte of each tensor of a safetensors file, in the order of the file.

    The format: eight bytes with the length of the header, the header in JSON, the tensors.
    """
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    offsets = {name: entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
    return {name: 8 + length + offset for name, offset in sorted(offsets.items(), key=lambda item: item[1])}


def _require_same_layout(model_dirs: Sequence[Path]) -> None:
    first, wanted = model_dirs[0], _layout(model_dirs[0])
    unknown = sorted({spelt for spelt, _ in wanted.values()} - set(DTYPES))
    if unknown:
        raise CheckpointError(
            f"{first} holds {', '.join(unknown)} tensors: a mean is taken of {', '.join(DTYPES)} only"
        )
    for other in model_dirs[1:]:
        found = _layout(other)
        for name in sorted(set(wanted) | set(found)):
            if wanted.get(name) != found.get(name):
                raise CheckpointError(
                    f"{name} is {_show(found, name)} in {other} and {_show(wanted, name)} in {first}: only checkpoints "
                    "of the same tensors can be averaged"
                )


def _differ(stored: Sequence[dict[str, safe_open]]) -> bool:
    """Whether any tensor is not the same everywhere; as a rule the first one tells."""
    first, *others = stored
    return any(
        not torch.equal(first[name].get_tensor(name), other[name].get_tensor(name))
        for name in first
        for other in others
    )


def _layout(model_dir: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> precision and shape."""
    shapes, files = read_shapes(model_dir), open_tensors(model_dir)
    return {name: (file.get_slice(name).get_dtype(), shapes[name]) for name, file in files.items()}


def _show(layout: dict, name: str) -> str:
    return f"{layout[name][0]} {list(layout[name][1])}" if name in layout else "missing"


# --- adapters ---------------------------------------------------------------------------------------------------------


def average_adapters(adapter_dirs: Sequence[Path], dtype: torch.dtype) -> Policy:
    """The first directory's base with one active adapter, whose product is the mean of the directories' products.

    Raises CheckpointError where they do not stand on one base.
    """
    base = adapter_base(adapter_dirs[0])
    for other in adapter_dirs[1:]:
        check_adapters(other)
        if adapter_base(other) != base:
            raise CheckpointError(
                f"{other} stands on {adapter_base(other)}, {adapter_dirs[0]} on {base}: only adapters of one base can be "
                "averaged"
            )
    policy = load_policy(adapter_dirs[0], dtype=dtype)
    names = [policy.model.active_adapter, *(f"other{number}" for number in range(1, len(adapter_dirs)))]
    for directory, name in zip(adapter_dirs[1:], names[1:], strict=True):
        policy.model.load_adapter(directory, adapter_name=name, torch_device="cpu")
    policy.model.add_weighted_adapter(names, [1 / len(names)] * len(names), MEAN, combination_type="cat")
    policy.model.set_adapter(MEAN)
    policy.model.eval()
    return policy


class Products(NamedTuple):
    """How near the averaged adapter's products are to the means of the products."""

    count: int
    difference: float  # the largest of any entry
    largest: float  # entry of the means


@torch.no_grad()
def check_products(policy: Policy) -> Products:
    """Recompute the means of a policy from `average_adapters`, product by product, in float64."""
    layers = [module for module in policy.model.modules() if isinstance(module, LoraLayer)]
    difference = largest = 0.0
    for layer in layers:
        products = [layer.get_delta_weight(name).double() for name in layer.lora_A if name != MEAN]
        wanted = sum(products) / len(products)
        difference = max(difference, float((layer.get_delta_weight(MEAN) - wanted).abs().max()))
        largest = max(largest, float(wanted.abs().max()))
    return Products(len(layers), difference, largest)
