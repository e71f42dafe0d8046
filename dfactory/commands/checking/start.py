"""Section `time to the first step`: a rough sum, each part with where it comes from.

Most of a small run's start is Python's imports and the records. This command has just done both, on this machine and as
busy as it is now, so they are timed; weights and the engine are added.
"""

from typing import NamedTuple

from dfactory.commands.checking.model import Model
from dfactory.commands.checking.page import Page, in_bytes
from dfactory.models.adapters import whole_model_dir
from dfactory.models.headers import weight_files
from dfactory.models.hub import is_downloaded
from dfactory.planning.start import CPU_RATE, DISK_RATE, ENGINE_S, GPU_RATE, IMPORTS_S, step_flop
from dfactory.planning.steps import BlockPhase
from dfactory.recipe import Recipe


class Timed(NamedTuple):
    """Seconds that this command has just taken for what training will do too."""

    imports_s: float
    reading_s: float


def tell_start(page: Page, recipe: Recipe, model: Model, timed: Timed, first: BlockPhase) -> None:
    """`first` is what the first rows hold."""
    model_dir = whole_model_dir(model.path)
    files = weight_files(model_dir) if recipe.init_weights == "pretrained" and is_downloaded(model_dir) else []
    stored = sum(file.stat().st_size for file in files)
    weights_s = stored / DISK_RATE
    work = step_flop(recipe, model.config, model.counts, first)
    imports = f"{timed.imports_s:.1f} s (measured now, by this command's own start)"
    if timed.imports_s < IMPORTS_S / 10:
        imports, timed = f"{IMPORTS_S:g} s (on an idle core)", timed._replace(imports_s=IMPORTS_S)
    before = timed.imports_s + timed.reading_s + weights_s + ENGINE_S
    page.line(
        "before it",
        f"about {in_time(before)}: Python and libraries {imports}, records {timed.reading_s:.1f} s (measured now), "
        f"{in_bytes(stored)} of weights {weights_s:.1f} s at an assumed {in_bytes(DISK_RATE)} a second, model and DeepSpeed "
        f"{ENGINE_S:g} s (of the quickstart)",
    )
    where = "each rank" if recipe.gradient_accumulation_tokens is None else "all ranks together"
    page.line(
        "a step",
        f"{work:.1e} FLOP on {where}: {in_time(work / CPU_RATE)} on a CPU core ({CPU_RATE:.1e} FLOP a second, measured "
        f"with the quickstart), {in_time(work / GPU_RATE)} on a GPU ({GPU_RATE:.0e}, assumed; the first step compiles "
        "flex_attention as well)",
    )


def in_time(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 0.1 else "under 0.1 s"
