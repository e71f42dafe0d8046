"""Whether the tensors of a model directory are those that its config.json asks for, by their original names.

Read from the headers of the safetensors files, before any weight is: a directory that does not fit is refused at once,
and the message names the tensors as their author wrote them, not as transformers renames and merges them.
"""

import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from dfactory.errors import CheckpointError

SHOWN = 8  # problems that a message spells out

Shapes = dict[str, tuple[int, ...]]


def read_shapes(model_dir: Path) -> Shapes:
    """Name -> shape of every tensor in the directory's *.safetensors. Raises CheckpointError that names a broken file."""
    shapes: Shapes = {}
    for file in sorted(model_dir.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as problem:
            raise CheckpointError(f"{file} is not a whole safetensors file: {problem}; copy it anew") from problem
    return shapes


def check_shapes(model_dir: Path, found: Shapes, model: PreTrainedModel) -> None:
    """Raise CheckpointError unless `found` is what `model` saves; tied tensors may be there or not.

    `model` may live on the meta device; its own weight conversions say under which names it saves.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in original_tensors(model).items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
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


def original_tensors(model: PreTrainedModel) -> dict:
    """The state dict under the names in which the model is saved."""
    return revert_weight_conversion(model, dict(model.state_dict()))
