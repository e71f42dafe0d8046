"""Reads DeepSpeed's shards as data, with torch's weights-only unpickler. It runs no code, and accepts tensors, plain values
and the few classes that such shards hold.

DeepSpeed 0.19 passes weights_only=False in every torch.load; an environment variable of torch overrides that. Its
converter to the universal format runs the same way: `python -m dfactory.engine.shards` with the converter's arguments.
"""

import contextlib
import os
import pickle
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from dfactory.errors import CheckpointError

CLASSES = [LossScaler, ZeroStageEnum, fragment_address]  # they only hold numbers
_PRECISION = re.compile(r"^(?:bf16|fp16)_")
FORCED, FORBIDDEN = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def absent_shards(names: Iterable[str], world_size: int, zero_stage: int) -> list[str]:
    """Shards that a checkpoint needs and these files lack: the model's state (with ZeRO-3 one per rank), and with ZeRO the
    optimiser's state of each rank."""
    there = {_PRECISION.sub("", name.rpartition("/")[2]) for name in names}
    wanted = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(world_size) if zero_stage > 0]
    wanted += [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(world_size) if zero_stage == 3]
    wanted += ["mp_rank_00_model_states.pt"] if zero_stage < 3 else []
    return [name for name in wanted if name not in there]


@contextlib.contextmanager
def read_as_data(checkpoint: Path) -> Iterator[None]:
    """A context in which torch.load runs no code, whatever its caller passes. Raises CheckpointError for a file that would
    need to."""
    before = {name: os.environ.pop(name, None) for name in (FORCED, FORBIDDEN)}
    os.environ[FORCED] = "1"
    try:
        with torch.serialization.safe_globals(CLASSES):
            yield
    except pickle.UnpicklingError as problem:
        raise CheckpointError(
            f"{checkpoint} holds a shard that is not plain data; none of its code was run: {_cause(problem)}. DeepSpeed "
            "does not write such shards: resume from your own checkpoint, or start a new run from its weights with "
            "model_name_or_path"
        ) from problem
    finally:
        del os.environ[FORCED]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _cause(problem: pickle.UnpicklingError) -> str:
    """The line of torch's message that names the offending class."""
    lines = [line.strip() for line in str(problem).splitlines()]
    return next((line.rstrip(".") for line in lines if "GLOBAL" in line), lines[0])


if __name__ == "__main__":
    words = ds_to_universal.parse_arguments()
    with read_as_data(Path(words.input_folder)):
        ds_to_universal.main(words)
