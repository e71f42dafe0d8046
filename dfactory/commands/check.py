"""`dfactory check`: shows what a recipe would do, before anything is loaded or written.

Sections (checking/) are printed in the order in which `train` would meet them. A section that fails prints its error and
those that do not need it go on; the first error's status is the command's. Nothing here computes what training computes:
the builders are train.py's own.
"""

from pathlib import Path

import torch

from dfactory.algorithms import Data
from dfactory.commands.checking.data import tell_data, tell_example
from dfactory.commands.checking.keys import tell_keys
from dfactory.commands.checking.memory import tell_memory
from dfactory.commands.checking.model import tell_model, tell_tokens, tell_weights
from dfactory.commands.checking.output import tell_output
from dfactory.commands.checking.page import Page
from dfactory.commands.checking.rollouts import tell_rollouts
from dfactory.commands.checking.start import Timed, tell_start
from dfactory.commands.checking.steps import tell_rows_and_steps
from dfactory.engine.expert_parallel import check_ranks
from dfactory.errors import ConfigError, DFactoryError
from dfactory.recipe import Loaded, Recipe
from dfactory.runs.folder import RunFolder
from dfactory.runs.precision import settled
from dfactory.uptime import Running, running

NOT_TIMED = Running(0.0, 0.0)
RANK_COUNTS = (1, 8, 16, 32, 64, 128)


def check(loaded: Loaded, gpus: int | None, imports: Running = NOT_TIMED) -> int:
    """Print the dry run. Returns 0 if the recipe would start, else the exit status of the first error. `imports` is how
    long the libraries took, which training needs too; 0 where they were there already."""
    recipe = loaded.recipe
    if gpus is not None and gpus < 1:
        raise ConfigError(f"--gpus {gpus}: give the number of ranks, 1 or more")
    shared = recipe.expert_parallel_size
    ranks = tuple(n for n in RANK_COUNTS if n % shared == 0) or (shared,) if gpus is None else (gpus,)
    check_ranks(recipe, ranks[0])
    page = Page()
    page.section("keys", tell_keys, loaded)
    on = "cuda" if gpus is not None or torch.cuda.is_available() else "cpu"
    precision = settled(recipe, on, _checkpoints(recipe))
    recipe = precision.recipe(recipe)
    model = page.section("model", tell_model, recipe, precision.note)
    phases = steps = None
    if model is not None:
        if recipe.init_weights == "pretrained":
            page.section("weights", tell_weights, model)
        sized = page.section("tokens", tell_tokens, recipe, model)
        model = sized or model
        if recipe.algorithm.data is Data.PROMPTS:
            page.section("rollouts", tell_rollouts, recipe)
        began = running()
        inputs = page.section("data", tell_data, recipe) if sized is not None else None
        reading = running().since(began)
        if inputs is not None and inputs.train is not None:
            page.section("example", tell_example, recipe, inputs)
            measured = page.section("rows and steps", tell_rows_and_steps, recipe, inputs, ranks)
            steps, phases = measured if measured is not None else (None, None)
        most_targets = None if phases is None else max(phase.most_targets for phase in phases)
        page.section("memory", tell_memory, recipe, model, ranks, most_targets)
        if phases is not None:
            page.section("time to the first step", tell_start, recipe, model, Timed(imports, reading), phases[0])
    page.section("output", tell_output, recipe, model, steps)
    return page.verdict()


def _checkpoints(recipe: Recipe) -> list[Path]:
    """That a run would resume from, the best first. What is wrong with them, section `output` says."""
    try:
        folder = RunFolder(recipe.output_dir)
        return folder.resume_candidates(recipe.resume_from_checkpoint, recipe.overwrite_output_dir)
    except DFactoryError:
        return []
