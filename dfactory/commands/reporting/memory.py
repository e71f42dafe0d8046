"""The memory that `dfactory check` forecasts for a rank, next to what the run measured."""

import tempfile
from pathlib import Path

from matplotlib.figure import Figure

from dfactory.commands.reporting.figures import COLOURS, new_figure, titled
from dfactory.commands.reporting.runs import Run
from dfactory.engine.trainer import deepspeed_config
from dfactory.errors import DFactoryError
from dfactory.models.hub import resolve
from dfactory.planning.memory import forecast, setup_of
from dfactory.recipe import load_recipe

METRICS = {
    "peak_memory": "GPU: peak of allocated bytes",
    "peak_rss": "CPU: growth of the process since its start, its records included",
}


def draw_memory(runs: list[Run]) -> Figure | None:
    """A pair of bars for each run that measured its memory. Without the initial model there is no forecast bar."""
    bars = []
    for run in runs:
        for metric in METRICS:
            if len(values := run.curve(metric)[1]):
                bars.append((run, metric, values.max(), forecast_of(run)))
    if not bars:
        return None
    figure, (axes,) = new_figure(1)
    for place, (_, _, measured, expected) in enumerate(bars):
        for offset, size, colour, name in (
            (-0.2, expected, COLOURS[0], "forecast"),
            (0.2, measured, COLOURS[1], "measured"),
        ):
            if size is not None:
                axes.barh(place + offset, size / 1e9, 0.36, color=colour, label=name if place == 0 else None)
                axes.text(size / 1e9, place + offset, f" {size / 1e9:.2f} GB", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [f"{run.label}\n({metric.removeprefix('peak_')})" for run, metric, *_ in bars])
    axes.set_ylim(max(len(bars), 2) - 0.5, -0.5)
    axes.margins(x=0.15)
    titled(axes, "memory of the first rank: forecast and measured", "GB")
    axes.set_ylabel("")
    axes.legend(fontsize=8, frameon=False, loc="best")
    explained = dict.fromkeys(METRICS[metric] for _, metric, *_ in bars)
    figure.supxlabel("measured on a " + "; ".join(explained), fontsize=8, color="#555555")
    return figure


def forecast_of(run: Run) -> float | None:
    """Forecast bytes for the run's recipe and ranks; host memory is added if the run had no GPU."""
    ranks = run.curve("ranks")[1]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(run.config)
        try:
            recipe = load_recipe(file)
            memory = forecast(
                resolve(recipe.model_name_or_path, recipe.model_revision, weights=False),
                setup_of(recipe, deepspeed_config(recipe), int(ranks[-1]) if len(ranks) else 1),
            )
        except DFactoryError:  # the model was moved, or is on another machine
            return None
    on_host = len(run.curve("peak_rss")[1]) > 0
    return memory.device_bytes + memory.host_bytes * on_host
