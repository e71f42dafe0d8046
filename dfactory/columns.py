"""The columns of a ViewBatch: names, types, shapes and owners of what is added to a batch after it was packed.

A column holds one number a target, a document, a position or a batch, as the letters at the end of its name say:
`advantage_D` has one a document. `ViewBatch.with_columns` refuses what is not listed here, so that a misspelt name or a
forgotten cast fails where the column is made, not where it is read. A file of one's own registers its columns:

    columns.register(Column("value_N", torch.float32, "my_package/critic.py", "the critic's value at each target"))
"""

import difflib
import fnmatch
from collections.abc import Mapping
from typing import NamedTuple

import torch

SHAPES = ("N", "D", "RS", "1")  # a number a target, a document, a row position, or one for the batch


class Column(NamedTuple):
    name: str  # ends in an underscore and one of SHAPES; `*` stands for any text
    dtype: torch.dtype
    owner: str  # the file that adds it
    meaning: str

    @property
    def shape(self) -> str:
        return self.name.rpartition("_")[2]


_COLUMNS: dict[str, Column] = {}


def register(column: Column) -> Column:
    """Put a column into the table. Raises ValueError if its name has no shape, or stands for something else already."""
    if column.shape not in SHAPES:
        raise ValueError(
            f"column {column.name} ends in none of {', '.join(f'_{shape}' for shape in SHAPES)}: rename it"
        )
    known = _COLUMNS.setdefault(column.name, column)
    if known != column:
        raise ValueError(f"column {column.name} of {column.owner} belongs to {known.owner} already: rename it")
    return column


def columns() -> tuple[Column, ...]:
    """All that are registered, in that order."""
    return tuple(_COLUMNS.values())


def column_of(name: str) -> Column:
    """The entry of a column. Raises ValueError if there is none."""
    found = _COLUMNS.get(name) or next((one for one in columns() if fnmatch.fnmatchcase(name, one.name)), None)
    if found is None:
        near = difflib.get_close_matches(name, _COLUMNS, n=1)
        hint = f"did you mean {near[0]}?" if near else "add it with dfactory.columns.register"
        raise ValueError(f"a batch has no column {name}: {hint}")
    return found


def check(name: str, values: torch.Tensor, sizes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError if a column is not registered, or is not of the dtype and shape that it is registered with.
    `sizes` has the shape of each of SHAPES."""
    column = column_of(name)
    if values.dtype != column.dtype:
        raise ValueError(f"column {name} is {values.dtype}, but {column.owner} declares it {column.dtype}: cast it")
    if tuple(values.shape) != sizes[column.shape]:
        raise ValueError(
            f"column {name} has shape {list(values.shape)}, but _{column.shape} is {list(sizes[column.shape])} in this batch"
        )


for _column in (
    Column(
        "visit_D", torch.int64, "data/source.py", "how often the record was seen before; with its id it keys the noise"
    ),
    Column("weight_D", torch.float32, "data/source.py", "what the record counts in the loss; absent: 1 each"),
    Column(
        "conditioned_N",
        torch.bool,
        "noise/uniform.py",
        "whether the model's first prediction goes to this canvas token",
    ),
    Column("drafted_N", torch.bool, "noise/edit.py", "whether the model's draft goes to this target"),
    Column(
        "embedding_noise_row_RS", torch.int64, "noise/embedding.py", "row of the table of noise; -1 at other tokens"
    ),
    Column("embedding_noise_seed_1", torch.int64, "noise/embedding.py", "the seed of that table"),
    Column("embedding_noise_std_1", torch.float32, "noise/embedding.py", "its standard deviation at this step"),
    Column("reference_elbo_D", torch.float32, "engine/reference.py", "the ELBO of the document by the reference"),
    Column("target_number_N", torch.int64, "rl/rows.py", "how many targets of the rollout come before this one"),
    Column("rollout_D", torch.int64, "rl/rows.py", "the rollout's place among those of this step, on all ranks"),
    Column("advantage_D", torch.float32, "rl/rows.py", "the rollout's advantage"),
    Column("share_D", torch.float32, "rl/rows.py", "1 over the documents that the rollout's views are spread over"),
    Column("response_blocks_D", torch.int64, "rl/rows.py", "blocks of the rollout that hold a response token"),
    Column(
        "old_logprob_N", torch.float32, "rl/source.py", "log-probability by the policy that the ratio compares with"
    ),
    Column("fresh_N", torch.bool, "rl/source.py", "whether the learner itself computed old_logprob"),
    Column("recorded_logprob_N", torch.float32, "rl/source.py", "log-probability by which the decoder drew the target"),
    Column("reference_logprob_N", torch.float32, "rl/source.py", "log-probability by the reference"),
    Column(
        "gradient_N",
        torch.float32,
        "engine/window.py",
        "the loss's derivative by the log-probability, where it is known",
    ),
    Column("first_logprob_N", torch.float32, "engine/replay.py", "log-probability in the first of two passes"),
    Column("coefficient_*_N", torch.float32, "engine/replay.py", "the loss term's derivative by that log-probability"),
):
    register(_column)
