"""The golden files of the model families: tiny checkpoints, and what the original code computed from them.

DFACTORY_GOLDEN_DIR names another folder of such files than tests/golden/families.
"""

import functools
import json
import os
from pathlib import Path
from types import SimpleNamespace

from safetensors.torch import load_file

from dfactory.errors import ConfigError
from dfactory.models.policy import Policy
from dfactory.models.registry import load_policy, read_family

FOLDER = Path(os.environ.get("DFACTORY_GOLDEN_DIR", Path(__file__).parents[1] / "golden" / "families"))
NAMES = sorted(file.parent.name for file in FOLDER.glob("*/expected.json"))


def is_known(name: str) -> bool:
    """Whether a family here claims the checkpoint."""
    try:
        read_family(FOLDER / name)
    except ConfigError:
        return False
    return True


FAMILIES_WITH_GOLDENS = [name for name in NAMES if is_known(name)]


@functools.cache
def golden(name: str) -> SimpleNamespace:
    """`directory`, `expected` (expected.json), and the tensors of forward.safetensors by name, dots as underscores."""
    directory = FOLDER / name
    tensors = {key.replace(".", "_"): tensor for key, tensor in load_file(directory / "forward.safetensors").items()}
    return SimpleNamespace(
        name=name, directory=directory, expected=json.loads((directory / "expected.json").read_text()), **tensors
    )


@functools.cache
def policy_of(name: str) -> Policy:
    """The checkpoint as a Policy in float32. Shared: a test that changes it loads its own."""
    return load_policy(FOLDER / name, dtype="float32")
