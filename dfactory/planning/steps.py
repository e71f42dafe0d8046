"""A dry run over the records: how full rows are, how many steps the run makes, how often it sees each document.

Rows are packed from lengths, as training packs them; only MEASURED_ROWS of them are built. A run with a schedule of block
sizes has a phase for each of them.
"""

import dataclasses
import math
from collections.abc import Callable

from dfactory.data.source import RecordSource
from dfactory.recipe import Recipe

MEASURED_ROWS = 64  # rows that are really built, to measure how full they are

MakeSource = Callable[[Recipe, int], RecordSource]
"""(recipe, number of ranks) -> the first rank's source of batches."""


@dataclasses.dataclass(frozen=True)
class BlockPhase:
    """A block size of the run, and what it makes of the data."""

    first: int  # step
    block_size: int
    epoch_rows: int
    rows: int  # that were measured
    fill: float  # share of their positions that hold a token
    tokens: float  # a row
    targets: float
    documents: float
    most_targets: int  # of a micro-batch
    epoch_steps: int = 1  # where steps are cut by tokens


@dataclasses.dataclass(frozen=True)
class Steps:
    """What the run is on so many ranks. A step has `rows` rows on all of them, in the mean where it is cut by tokens."""

    ranks: int
    rows: float
    steps: int
    epochs: float
    steps_an_epoch: int  # in the last phase
    tokens: float  # of a step of the last phase, in all streams


def phases_of(recipe: Recipe, make_source: MakeSource) -> list[BlockPhase]:
    """The phases of the run, each measured as if the run began with it."""
    return [_measure_phase(recipe, make_source, first, size) for first, size in recipe.block_phases]


def steps_on(recipe: Recipe, make_source: MakeSource, phases: list[BlockPhase], ranks: tuple[int, ...]) -> list[Steps]:
    """The run on each number of ranks."""
    last, found = phases[-1], []
    for count, steps in _steps(recipe, make_source, ranks).items():
        rows = rows_a_step(recipe, last, count)
        epochs = recipe.num_train_epochs if recipe.max_steps is None else _epochs(phases, steps, rows)
        found.append(Steps(count, rows, steps, epochs, math.ceil(last.epoch_rows / rows), rows * last.tokens))
    return found


def rows_a_step(recipe: Recipe, phase: BlockPhase, ranks: int) -> float:
    """Rows of a step on all ranks; where steps are cut by tokens, their mean, which is that of any number of ranks."""
    if recipe.gradient_accumulation_tokens is not None:
        return phase.epoch_rows / phase.epoch_steps
    return ranks * recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps


def _measure_phase(recipe: Recipe, make_source: MakeSource, first: int, block_size: int) -> BlockPhase:
    alone = dataclasses.replace(recipe, block_size_schedule=[[0, block_size]])
    epoch_rows, epoch_steps = _rows_of(alone, make_source, 1.0), 1
    if recipe.gradient_accumulation_tokens is not None:
        epoch_steps = make_source(dataclasses.replace(alone, max_steps=None, num_train_epochs=1.0), 1).num_windows
    return BlockPhase(first, block_size, epoch_rows, *_measure_rows(make_source(alone, 1)), epoch_steps)


def _steps(recipe: Recipe, make_source: MakeSource, ranks: tuple[int, ...]) -> dict[int, int]:
    """Steps of the run by number of ranks. Without a schedule rows do not depend on it, so one packing tells all."""
    if recipe.max_steps is not None:
        return dict.fromkeys(ranks, recipe.max_steps)
    if recipe.block_size_schedule is not None or recipe.gradient_accumulation_tokens is not None:
        return {count: make_source(recipe, count).num_windows for count in ranks}
    rows = _rows_of(recipe, make_source, recipe.num_train_epochs)
    rows_a_rank = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps
    return {count: math.ceil(rows / (count * rows_a_rank)) for count in ranks}


def _epochs(phases: list[BlockPhase], steps: int, rows_a_step: int) -> float:
    """Passes over the data in so many steps."""
    ends = [min(phase.first, steps) for phase in phases[1:]] + [steps]
    in_phase = [end - min(phase.first, steps) for phase, end in zip(phases, ends, strict=True)]
    return sum(count * rows_a_step / phase.epoch_rows for phase, count in zip(phases, in_phase, strict=True))


def _measure_rows(source: RecordSource) -> tuple[int, float, float, float, float, int]:
    """(how many rows, share of positions that hold a token, tokens a row, targets a row, documents a row, most targets of a
    micro-batch) at the start."""
    rows = positions = tokens = targets = documents = most = 0
    while rows < MEASURED_ROWS and (window := source.next_window()) is not None:
        for batch in window:
            filled = int((batch.document_RS >= 0).any(dim=1).sum())  # the last global batch has empty rows
            rows, positions = rows + filled, positions + filled * batch.document_RS.shape[1]
            tokens, targets = tokens + batch.num_tokens, targets + batch.num_targets
            documents, most = documents + len(batch.document_id_D), max(most, batch.num_targets)
    return rows, tokens / positions, tokens / rows, targets / rows, documents / rows, most


def _rows_of(recipe: Recipe, make_source: MakeSource, epochs: float) -> int:
    """Rows of so many epochs: the steps of a run whose steps have one row."""
    one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "gradient_accumulation_tokens": None}
    single = dataclasses.replace(recipe, max_steps=None, num_train_epochs=epochs or 1.0, **one)
    return make_source(single, 1).num_windows
