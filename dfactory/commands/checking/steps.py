"""Section `rows and steps`: how records fill rows, what a step is on so many ranks, and the learning rate over them."""

import functools
from pathlib import Path

from omegaconf import OmegaConf

from dfactory.algorithms import Data
from dfactory.algorithms.base import choices_of
from dfactory.assembly import Inputs, make_source
from dfactory.commands.checking.page import Page, right_aligned
from dfactory.data.source import RecordSource
from dfactory.models.hub import resolve
from dfactory.models.registry import is_unconverted
from dfactory.planning.steps import BlockPhase, phases_of, steps_on
from dfactory.recipe import Recipe

MANY_EPOCHS, LONG_RUN = 20, 2000  # from which on a word is said
PHASE_COLUMNS = ("from step", "block size", "row full", "tokens a row", "targets a row", "rows an epoch")


def tell_rows_and_steps(
    page: Page, recipe: Recipe, inputs: Inputs, ranks: tuple[int, ...]
) -> tuple[int, list[BlockPhase]]:
    """Returns the steps of the run on the fewest ranks, and what rows hold in each phase."""
    sources = functools.partial(_source_of, inputs)
    phases = phases_of(recipe, sources)
    source, last = sources(recipe, 1), phases[-1]
    page.line(
        "row",
        f"{source.row_length:,} positions: documents with {recipe.views_per_document} view(s) each, "
        f"{'packed' if recipe.packing else 'one a row, not packed'}",
        f"the first {last.rows} are {last.fill:.0%} full and hold {last.documents:.1f} documents and {last.targets:,.0f} "
        "targets each",
    )
    if len(phases) > 1:
        page.line("block sizes", right_aligned(PHASE_COLUMNS, map(_cells, phases)))
    if recipe.packing and min(phase.fill for phase in phases) < 0.7:
        page.warn(f"rows are only {min(phase.fill for phase in phases):.0%} full: choose another row_length")
    plans = steps_on(recipe, sources, phases, ranks)
    cells = []
    for plan in plans:
        numbers = (plan.ranks, plan.rows, plan.tokens, plan.steps_an_epoch, plan.steps)
        cells.append((*(f"{number:,.0f}" for number in numbers), f"{plan.epochs:.2f}"))
    columns = ("ranks", "rows a step", "tokens a step", "steps an epoch", "steps", "epochs")
    page.line("steps", right_aligned(columns, cells))
    rule = f"ranks x per_device_train_batch_size x gradient_accumulation_steps = ranks x {source.rows_per_window}"
    if recipe.gradient_accumulation_tokens is not None:
        rule = f"as many as have {recipe.gradient_accumulation_tokens:,} response tokens or more, here the mean"
    where = f", of block size {last.block_size}" if len(phases) > 1 else ""
    page.line("", f"rows a step = {rule}; tokens are those of all streams{where}")
    steps = plans[0].steps
    _schedule(page, recipe, steps)
    _warn_of_repetition(page, steps, plans[0].epochs, recipe)
    return steps, phases


def _warn_of_repetition(page: Page, steps: int, epochs: float, recipe: Recipe) -> None:
    if epochs > MANY_EPOCHS:
        page.warn(f"every document is seen {epochs:.0f} times: watch the held-out loss, or lower max_steps")
    if recipe.save_steps is None and recipe.save_strategy in ("no", "steps") and steps >= LONG_RUN:
        page.warn(
            f"save_steps is null: if a run of {steps:,} steps breaks off, all of it is lost; save every few hundred"
        )


def _source_of(inputs: Inputs, recipe: Recipe, ranks: int) -> RecordSource:
    return make_source(recipe, inputs, rank=0, world_size=ranks)


def _cells(phase: BlockPhase) -> tuple[str, ...]:
    numbers = (phase.tokens, phase.targets, phase.epoch_rows)
    return f"{phase.first:,}", f"{phase.block_size:,}", f"{phase.fill:.0%}", *(f"{number:,.0f}" for number in numbers)


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


def _usual_rates(recipe: Recipe) -> tuple[str, float, float]:
    """What is trained, and the rates that are common for it."""
    if recipe.use_peft:
        return "LoRA", 1e-5, 2e-3
    if recipe.init_weights == "random":
        return "random weights", 1e-5, 1e-2
    if is_unconverted(resolve(recipe.model_name_or_path, recipe.model_revision, weights=False)):
        return "converting all weights of an autoregressive model", 1e-6, 2e-3
    return "fine-tuning all weights", 1e-7, 1e-4


def _warn_of_rate(page: Page, recipe: Recipe) -> None:
    """A rate that is unusual, or of a preference stage above that of the run it starts from."""
    rate = recipe.learning_rate
    kind, low, high = _usual_rates(recipe)
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
