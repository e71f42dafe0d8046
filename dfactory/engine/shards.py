"""DeepSpeed's shards are read as data: by torch's weights-only unpickler, which runs nothing, and knows besides tensors and
plain values the few classes that such shards hold.

DeepSpeed 0.19 says weights_only=False in every torch.load of its own; torch lets the environment overrule that. Its
converter to the universal format runs the same way: `python -m dfactory.engine.shards` with the converter's own words.
"""

import contextlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from dfactory.errors import CheckpointError

CLASSES = [LossScaler, ZeroStageEnum, fragment_address]  # plain holders of numbers
FORCED, FORBIDDEN = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextlib.contextmanager
def read_as_data(checkpoint: Path) -> Iterator[None]:
    """Within it torch.load runs no code, whatever its caller says. Raises CheckpointError for a file that would need to."""
    before = {name: os.environ.pop(name, None) for name in (FORCED, FORBIDDEN)}
    os.environ[FORCED] = "1"
    try:
        with torch.serialization.safe_globals(CLASSES):
            yield
    except pickle.UnpicklingError as problem:
        raise CheckpointError(
            f"{checkpoint} holds a shard that is no plain data, and nothing of it was run: {_cause(problem)}. DeepSpeed "
            "does not write such: resume from a checkpoint of your own, or start anew from its weights by model_name_or_path"
        ) from problem
    finally:
        del os.environ[FORCED]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _cause(problem: pickle.UnpicklingError) -> str:
    """The line of torch's message that names what was found."""
    lines = [line.strip() for line in str(problem).splitlines()]
    return next((line.rstrip(".") for line in lines if "GLOBAL" in line), lines[0])


if __name__ == "__main__":
    words = ds_to_universal.parse_arguments()
    with read_as_data(Path(words.input_folder)):
        ds_to_universal.main(words)
