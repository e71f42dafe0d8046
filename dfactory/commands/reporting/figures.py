"""Pictures of metrics over the steps. Runs of one stage share axes; each stage has its own, because losses of different
stages are not comparable. A new metric is a line in FIGURES.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dfactory.commands.reporting.runs import Run

COLOURS = ("#1f5fa8", "#c4531a", "#2e7d4f", "#8a3ea3", "#8c6d1f", "#4d4d4d")  # one per run
LINES = ("-", "--", "-.")  # one per run, so that two equal curves are both visible
EVAL_BY_T = re.compile(r"eval/loss_t(\d+\.\d+)")
SMOOTH_SHARE = 20  # the smoothed line averages over about 1/20 of the points


Size = tuple[float, float]  # inches


class Panel(NamedTuple):
    """One row of axes: a training metric, the same on held-out documents, or both."""

    title: str
    metric: str
    held_out: str | None = None
    log: bool = False  # a log axis if the values span more than a factor of 20
    from_zero: bool = False
    exact: bool = False  # never smoothed


PHASES = {  # metric seconds/NAME -> what is shown
    "batch": "records or rollouts",
    "scoring": "scores without a gradient",
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimiser",
    "evaluation": "evaluation before it",
    "save": "checkpoint before it",
}
FIGURES: dict[str, tuple[Panel, ...]] = {
    "loss": (Panel("loss", "loss", "eval/loss", log=True),),
    "hit_rate": (Panel("share of masked tokens predicted", "hit_rate", "eval/hit_rate"),),
    "decoding": (
        Panel("tokens per forward", "tokens_per_forward", "eval/tokens_per_forward", from_zero=True),
        Panel("exact match", "exact_match", "eval/exact_match", from_zero=True),
    ),
    "preferences": (
        Panel("chosen above rejected", "rewards/accuracies", "eval/rewards/accuracies", from_zero=True),
        Panel("margin", "rewards/margins", "eval/rewards/margins"),
    ),
    "rewards": (
        Panel("mean reward of the rollouts", "reward", from_zero=True),
        Panel("different answers in a group", "unique_fraction", from_zero=True),
        Panel("groups without a signal", "frac_reward_zero_std", from_zero=True),
        Panel("tokens of a response", "completions/mean_length", from_zero=True),
    ),
    "rollouts": (
        Panel("seconds waited for rollouts", "seconds/rollout_wait", from_zero=True),
        Panel("age of rollouts in policy versions", "staleness", from_zero=True, exact=True),
    ),
    "confidence": (Panel("entropy of correct predictions", "confidence", from_zero=True),),
    "optimiser": (
        Panel("gradient norm before clipping", "grad_norm", log=True),
        Panel("learning rate", "learning_rate", from_zero=True, exact=True),
    ),
    "phases": tuple(
        Panel(f"seconds of a step: {title}", f"seconds/{name}", from_zero=True) for name, title in PHASES.items()
    ),
    "speed": (
        Panel("tokens per second, all ranks", "tokens_per_second", from_zero=True),
        Panel("model FLOPs utilisation", "mfu", from_zero=True),
    ),
}


def drawings() -> dict[str, Callable[[list[Run]], Figure | None]]:
    """File name -> drawing function, in the order of the page. It returns None if no run has the numbers."""
    every = {name: lambda runs, panels=panels: draw_panels(runs, panels) for name, panels in FIGURES.items()}
    return {"loss": every.pop("loss"), "loss_by_t": draw_by_t, **every}


def draw_panels(runs: list[Run], panels: tuple[Panel, ...], size: Size | None = None) -> Figure | None:
    """`size` is that of a figure with one panel, where it is not the one of a page's width."""
    panels = tuple(panel for panel in panels if any(_has(run, panel) for run in runs))
    if not panels:
        return None
    stages = list(dict.fromkeys(run.stage for run in runs))
    cells = [
        (panel, stage, members)
        for panel in panels
        for stage in stages
        if (members := [run for run in runs if run.stage == stage and _has(run, panel)])
    ]
    figure, every_axes = new_figure(len(cells), size)
    for (panel, stage, members), axes in zip(cells, every_axes, strict=True):
        for place, run in enumerate(members):
            _draw_run(
                axes, run, panel, COLOURS[runs.index(run) % len(COLOURS)], LINES[place % len(LINES)], len(runs) > 1
            )
        _finish(axes, panel._replace(title=panel.title if len(stages) == 1 else f"{panel.title}: {stage}"))
    return figure


def new_figure(cells: int, size: Size | None = None) -> tuple[Figure, list[Axes]]:
    """A figure with `cells` axes, two in a row."""
    columns = min(2, cells)
    rows = math.ceil(cells / columns)
    size = size or (8 if columns == 1 else 10.4, 0.4 + 3.2 * rows)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    figure.get_layout_engine().set(hspace=0.06)
    every_axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in every_axes[cells:]:
        spare.set_axis_off()
    return figure, every_axes[:cells]


def _has(run: Run, panel: Panel) -> bool:
    return any(len(run.curve(name)[0]) for name in (panel.metric, panel.held_out) if name is not None)


def _draw_run(axes: Axes, run: Run, panel: Panel, colour: str, style: str, several: bool) -> None:
    steps, values = run.curve(panel.metric)
    training, smoothed = _label(run, "training", several), smooth(values)
    if len(steps) and (panel.exact or smoothed is None):
        axes.plot(steps, values, style, color=colour, linewidth=1.6, marker=_marker(steps), label=training)
    elif len(steps):
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
        axes.plot(steps, smoothed, style, color=colour, linewidth=1.8, label=training)
    if panel.held_out is not None and len((held_out := run.curve(panel.held_out))[0]):
        if not several:
            colour = COLOURS[1]
        label = _label(run, "held out", several)
        axes.plot(*held_out, ":", color=colour, linewidth=1.4, marker="D", markersize=4.5, label=label)


def _label(run: Run, text: str, several: bool) -> str:
    return f"{run.label}, {text}" if several else text


def draw_by_t(runs: list[Run], size: Size | None = None) -> Figure | None:
    """Held-out loss at each mask ratio t, darker for less noise. One plot per run."""
    names = sorted({name for run in runs for row in run.rows for name in row if EVAL_BY_T.fullmatch(name)})
    shown = [run for run in runs if any(len(run.curve(name)[0]) for name in names)]
    if not shown:
        return None
    figure, every_axes = new_figure(len(shown), size)
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(names)))
    title = "held-out loss by mask ratio t"
    for run, axes in zip(shown, every_axes, strict=True):
        for name, shade in zip(names, shades, strict=True):
            curve = run.curve(name)
            if len(curve[0]):
                axes.plot(
                    *curve, color=shade, marker="o", markersize=4, label=f"t = {float(EVAL_BY_T.fullmatch(name)[1]):g}"
                )
        _finish(axes, Panel(title if len(shown) == 1 else f"{title}: {run.label}", "", log=True), beside=True)
    return figure


def _finish(axes: Axes, panel: Panel, beside: bool = False) -> None:
    """`beside`: the legend, where curves leave no room for it among them."""
    titled(axes, panel.title, "optimiser step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    values = np.concatenate([line.get_ydata() for line in axes.lines])
    if panel.log and (values > 0).all() and values.max() > 20 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")  # matplotlib writes powers of ten as formulas, which are switched off
    elif panel.from_zero:
        axes.set_ylim(*from_zero(values.min(), values.max()))
        axes.ticklabel_format(axis="y", scilimits=(-3, 6))
    labels = [label for line in axes.lines if not (label := str(line.get_label())).startswith("_")]
    if len(labels) > 1 or any("held out" in label for label in labels):
        place = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if beside else {"loc": "best"}
        axes.legend(fontsize=8, frameon=True, framealpha=0.8, edgecolor="none", handlelength=3, **place)


def from_zero(low: float, high: float) -> tuple[float, float]:
    """The ends of an axis that holds zero and all values, rewards below zero too, with room for a line at either end."""
    low, high = min(low, 0), max(high, 0)
    room = (high - low) or 1
    return low - (0.08 if low < 0 else 0.02) * room, high + (0.08 if high > 0 or low == 0 else 0.02) * room


def titled(axes: Axes, title: str, xlabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel(xlabel, fontsize=9)
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def smooth(values: np.ndarray) -> np.ndarray | None:
    """Centred moving mean whose window shrinks at the ends; None if there are too few values."""
    half = len(values) // (2 * SMOOTH_SHARE)
    if half == 0:
        return None
    kernel = np.ones(2 * half + 1)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _marker(steps: np.ndarray) -> str | None:
    return "." if len(steps) <= 2 * SMOOTH_SHARE else None
