"""Section `rows and steps`: how records fill rows, what a step is on so many ranks, and the learning rate over them."""

import dataclasses
import math
from pathlib import Path
from typing import ClassVar

from omegaconf import OmegaConf

from dfactory.algorithms import Data
from dfactory.algorithms.base import choices_of
from dfactory.assembly import Inputs, make_source
from dfactory.commands.checking.page import Page, right_aligned
from dfactory.data.source import RecordSource
from dfactory.recipe import Recipe

MANY_EPOCHS, LONG_RUN = 20, 2000  # from which on a word is said
MEASURED_ROWS = 64  # rows that are really built, to measure how full they are


def tell_rows_and_steps(page: Page, recipe: Recipe, inputs: Inputs, ranks: tuple[int, ...]) -> tuple[int, "Phase"]:
    """Returns the steps of the run on the fewest ranks, and what rows hold at its beginning."""
    phases = [_measure_phase(recipe, inputs, first, size) for first, size in recipe.block_phases]
    source, last = make_source(recipe, inputs, rank=0, world_size=1), phases[-1]
    page.line(
        "row",
        f"{source.row_length:,} positions: documents with {recipe.views_per_document} view(s) each, "
        f"{'packed' if recipe.packing else 'one a row, not packed'}",
        f"the first {last.rows} are {last.fill:.0%} full and hold {last.documents:.1f} documents and {last.targets:,.0f} "
        "targets each",
    )
    if len(phases) > 1:
        page.line("block sizes", right_aligned(Phase.COLUMNS, (phase.cells for phase in phases)))
    if recipe.packing and min(phase.fill for phase in phases) < 0.7:
        page.warn(f"rows are only {min(phase.fill for phase in phases):.0%} full: choose another row_length")
    steps_of = _steps(recipe, inputs, ranks)
    cells = []
    for count, steps in steps_of.items():
        rows = count * source.rows_per_window
        numbers = (count, rows, rows * last.tokens, math.ceil(last.epoch_rows / rows), steps)
        epochs = recipe.num_train_epochs if recipe.max_steps is None else _epochs(phases, steps, rows)
        cells.append((*(f"{number:,.0f}" for number in numbers), f"{epochs:.2f}"))
    columns = ("ranks", "rows a step", "tokens a step", "steps an epoch", "steps", "epochs")
    page.line("steps", right_aligned(columns, cells))
    rule = "ranks x per_device_train_batch_size x gradient_accumulation_steps"
    where = f", of block size {last.block_size}" if len(phases) > 1 else ""
    page.line("", f"rows a step = {rule} = ranks x {source.rows_per_window}; tokens are those of all streams{where}")
    steps = steps_of[ranks[0]]
    _schedule(page, recipe, steps)
    _warn_of_repetition(page, steps, float(cells[0][-1]), recipe)
    return steps, phases[0]


def _warn_of_repetition(page: Page, steps: int, epochs: float, recipe: Recipe) -> None:
    if epochs > MANY_EPOCHS:
        page.warn(f"every document is seen {epochs:.0f} times: watch the held-out loss, or lower max_steps")
    if recipe.save_steps is None and steps >= LONG_RUN:
        page.warn(
            f"save_steps is null: if a run of {steps:,} steps breaks off, all of it is lost; save every few hundred"
        )


@dataclasses.dataclass(frozen=True)
class Phase:
    """A block size of the run, and what it makes of the data."""

    COLUMNS: ClassVar = ("from step", "block size", "row full", "tokens a row", "targets a row", "rows an epoch")

    first: int
    block_size: int
    epoch_rows: int
    rows: int  # that were measured
    fill: float  # share of their positions that hold a token
    tokens: float  # a row
    targets: float
    documents: float

    @property
    def cells(self) -> tuple[str, ...]:
        numbers = (self.tokens, self.targets, self.epoch_rows)
        return f"{self.first:,}", f"{self.block_size:,}", f"{self.fill:.0%}", *(f"{number:,.0f}" for number in numbers)


def _measure_phase(recipe: Recipe, inputs: Inputs, first: int, block_size: int) -> Phase:
    """The phase alone, as if the run began with it."""
    alone = dataclasses.replace(recipe, block_size_schedule=[[0, block_size]])
    source = make_source(alone, inputs, rank=0, world_size=1)
    return Phase(first, block_size, _rows_of(alone, inputs, 1.0), *_measure_rows(source))


def _steps(recipe: Recipe, inputs: Inputs, ranks: tuple[int, ...]) -> dict[int, int]:
    """Steps of the run by number of ranks. Without a schedule rows do not depend on it, so one packing tells all."""
    if recipe.max_steps is not None:
        return dict.fromkeys(ranks, recipe.max_steps)
    if recipe.block_size_schedule is not None:
        return {count: make_source(recipe, inputs, rank=0, world_size=count).num_windows for count in ranks}
    rows = _rows_of(recipe, inputs, recipe.num_train_epochs)
    a_step = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps
    return {count: math.ceil(rows / (count * a_step)) for count in ranks}


def _epochs(phases: list[Phase], steps: int, rows_a_step: int) -> float:
    """Passes over the data in so many steps."""
    ends = [min(phase.first, steps) for phase in phases[1:]] + [steps]
    in_phase = [end - min(phase.first, steps) for phase, end in zip(phases, ends, strict=True)]
    return sum(count * rows_a_step / phase.epoch_rows for phase, count in zip(phases, in_phase, strict=True))


def _measure_rows(source: RecordSource) -> tuple[int, float, float, float, float]:
    """(how many rows, share of positions that hold a token, tokens a row, targets a row, documents a row) at the start."""
    rows = positions = tokens = targets = documents = 0
    while rows < MEASURED_ROWS and (window := source.next_window()) is not None:
        for batch in window:
            filled = int((batch.document_RS >= 0).any(dim=1).sum())  # the last window has empty rows
            rows, positions = rows + filled, positions + filled * batch.document_RS.shape[1]
            tokens, targets = tokens + batch.num_tokens, targets + batch.num_targets
            documents += len(batch.document_id_D)
    return rows, tokens / positions, tokens / rows, targets / rows, documents / rows


def _rows_of(recipe: Recipe, inputs: Inputs, epochs: float) -> int:
    one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    single = dataclasses.replace(recipe, max_steps=None, num_train_epochs=epochs or 1.0, **one)
    return make_source(single, inputs, rank=0, world_size=1).num_windows


def _schedule(page: Page, recipe: Recipe, steps: int) -> None:
    rate = recipe.learning_rate
    page.line(
        "learning rate",
        f"0 to {rate:g} in {recipe.warmup_of(steps)} steps, then {recipe.lr_scheduler_type}"
        + ("" if recipe.lr_scheduler_type == "constant" else f" to {recipe.lr_min:g}"),
    )
    if recipe.mask_embedding_noise:
        std, last = recipe.mask_embedding_noise, recipe.mask_embedding_noise_steps
        page.line(
            "noise on masks", f"in their embeddings, of standard deviation {std:g} at step 0 and 0 from step {last} on"
        )
    if recipe.warmup_of(steps) >= steps:
        page.warn(
            f"warmup_steps {recipe.warmup_steps:g}, but the run has {steps}: the learning rate never reaches its peak"
        )
    _warn_of_rate(page, recipe)
    for name in ("save_steps", "eval_steps"):
        if (every := getattr(recipe, name)) is not None and every > steps:
            page.warn(f"{name} {every} is more than the {steps} steps of the run: it will happen at the last step only")


def _warn_of_rate(page: Page, recipe: Recipe) -> None:
    """A rate that is unusual, or of a preference stage above that of the run it starts from."""
    rate, fresh = recipe.learning_rate, recipe.init_weights == "random"
    low, high = (1e-5, 2e-3) if recipe.use_peft else (1e-5, 1e-2) if fresh else (1e-7, 1e-4)
    kind = "LoRA" if recipe.use_peft else "random weights" if fresh else "fine-tuning all weights"
    if not low <= rate <= high:
        page.warn(f"learning_rate {rate:g} is unusual for {kind}: {low:g} to {high:g} is common")
    if recipe.algorithm.data is not Data.PAIRS or recipe.model_name_or_path == "tiny":
        return
    plain = {stage for stage, algorithm in choices_of("stage").items() if algorithm.data is Data.RECORDS}
    path = Path(recipe.model_name_or_path)
    for file in (path / "config.yaml", path.parent / "config.yaml"):  # a run folder, or a checkpoint in one
        before = OmegaConf.load(file) if file.is_file() else {}
        if before.get("stage") in plain and rate > before["learning_rate"]:
            page.warn(
                f"learning_rate {rate:g} of stage {recipe.stage} is above the {before['learning_rate']:g} of the run that "
                "it starts from: preferences are usually learnt at its final rate or below"
            )
            return
