"""Section `time to the first step`: a sum, each part with where it comes from.

Most of a small run's start is Python's imports and the records. This command has just done both, on this machine and as
busy as it is now, so they are timed; and so is a product of matrices as wide as the model. `dfactory train` says what it
took: metrics `start_seconds` and `start_cpu_seconds` of the first step.
"""

from typing import NamedTuple

from dfactory.commands.checking.model import Model
from dfactory.commands.checking.page import Page, in_bytes
from dfactory.models.adapters import whole_model_dir
from dfactory.models.headers import weight_files
from dfactory.models.hub import is_downloaded
from dfactory.planning.start import (
    CPU_SHARE,
    DISK_RATE,
    ENGINE_S,
    GPU_RATE,
    IMPORTS_S,
    matmul_rate,
    step_flop,
)
from dfactory.planning.steps import BlockPhase
from dfactory.recipe import Recipe
from dfactory.runs.precision import slow_precision
from dfactory.uptime import Running


class Timed(NamedTuple):
    """What this command has just taken for what training will do too."""

    imports: Running
    reading: Running


def tell_start(page: Page, recipe: Recipe, model: Model, timed: Timed, first: BlockPhase) -> None:
    """`first` is what the first rows hold."""
    model_dir = whole_model_dir(model.path)
    files = weight_files(model_dir) if recipe.init_weights == "pretrained" and is_downloaded(model_dir) else []
    stored = sum(file.stat().st_size for file in files)
    weights_s = stored / DISK_RATE
    work = step_flop(recipe, model.config, model.counts, first)
    imports = f"{timed.imports.wall_s:.1f} s (measured now, by this command's own start)"
    if timed.imports.wall_s < IMPORTS_S / 10:
        imports, timed = f"{IMPORTS_S:g} s (on an idle core)", timed._replace(imports=Running(IMPORTS_S, IMPORTS_S))
    reading = f"{timed.reading.wall_s:.1f} s (measured now)"
    if recipe.streaming:
        reading, timed = "as they are visited", timed._replace(reading=Running(0.0, 0.0))
    fixed = weights_s + ENGINE_S
    before, cpu = (fixed + sum(part) for part in zip(timed.imports, timed.reading, strict=True))
    page.line(
        "before it",
        f"about {in_time(before)}: Python and libraries {imports}, records {reading}, "
        f"{in_bytes(stored)} of weights {weights_s:.1f} s at an assumed {in_bytes(DISK_RATE)} a second, model and DeepSpeed "
        f"{ENGINE_S:g} s (of the quickstart)",
    )
    rate = matmul_rate(model.config.hidden_size, recipe.dtype)
    step = Running(*(work / (CPU_SHARE * of_each) for of_each in rate))
    where = "each rank" if recipe.gradient_accumulation_tokens is None else "all ranks together"
    page.line(
        "a step",
        f"{work:.1e} FLOP on {where}: {in_time(step.wall_s)} on this CPU ({CPU_SHARE:.0%} of {rate.wall_s:.1e} FLOP a "
        f"second, its rate of products {model.config.hidden_size:,} wide, measured now), "
        f"{in_time(work / GPU_RATE)} on a GPU ({GPU_RATE:.0e}, assumed; the first step compiles flex_attention as well)",
    )
    for slow in slow_precision(recipe, "cpu"):
        page.line("", slow)
    page.line(
        "first step",
        f"about {_to_a_tenth(before + step.wall_s)} after the command on this CPU, {_to_a_tenth(cpu + step.cpu_s)} of the "
        "processor",
    )


def _to_a_tenth(seconds: float) -> str:
    """Of a second, where it is seconds."""
    return f"{seconds:.1f} s" if seconds < 600 else in_time(seconds)


def in_time(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 0.1 else "under 0.1 s"
