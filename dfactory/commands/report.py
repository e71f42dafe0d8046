"""`dfactory report`: metrics.jsonl of one or more runs -> RUN/report/ with PNGs and one HTML file that stands alone.

Several runs are laid over each other, in the folder of the first. Curves that no run has are left out; a new metric is a
line in FIGURES.
"""

import base64
import html
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console

from dfactory.engine.runfolder import RunFolder, replace_text

REPORT, PAGE = "report", "report.html"
COLOURS = ("#1f5fa8", "#c4531a", "#2e7d4f", "#8a3ea3", "#8c6d1f", "#4d4d4d")  # a run each
LINES = ("-", "--", "-.")  # a run each, so that equal curves are both seen
EVAL_BY_T = re.compile(r"eval/loss_t(\d+\.\d+)")
SMOOTH_SHARE = 20  # the smoothed line averages over about 1/20 of the points
TAIL_SHARE = 10  # final training numbers are means over the last 1/10 of the steps

Curve = tuple[np.ndarray, np.ndarray]  # steps, values


class Run(NamedTuple):
    """What a run folder says about itself."""

    label: str
    path: Path
    rows: list[dict[str, Any]]  # metrics.jsonl
    config: str  # config.yaml, resolved

    def curve(self, metric: str) -> Curve:
        points = [(row["step"], row[metric]) for row in self.rows if metric in row]
        steps, values = zip(*points, strict=True) if points else ((), ())
        return np.array(steps, float), np.array(values, float)


class Panel(NamedTuple):
    """One pair of axes: a training metric, the same on held-out documents, or both."""

    title: str
    metric: str
    held_out: str | None = None
    log: bool = False  # where the values span more than a factor of 20
    from_zero: bool = False
    exact: bool = False  # never smoothed


FIGURES: dict[str, tuple[Panel, ...]] = {
    "loss": (Panel("loss", "loss", "eval/loss"),),
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
        Panel("policy versions behind", "staleness", from_zero=True, exact=True),
    ),
    "confidence": (Panel("entropy of correct predictions", "confidence", from_zero=True),),
    "optimiser": (
        Panel("gradient norm before clipping", "grad_norm", log=True),
        Panel("learning rate", "learning_rate", from_zero=True, exact=True),
    ),
    "speed": (Panel("tokens per second, all ranks", "tokens_per_second", from_zero=True),),
}


def report(runs: list[str]) -> int:
    """Draw the curves of the run folders into the first one's report/ and say where."""
    page = write_report([Path(run) for run in runs])
    Console(highlight=False, soft_wrap=True).print(
        f"{page} and {len(list(page.parent.glob('*.png')))} pictures beside it"
    )
    return 0


def write_report(run_dirs: list[Path]) -> Path:
    """Write RUN/report/ of the first run; returns its HTML page. Raises DataError where metrics.jsonl is missing, empty
    or broken."""
    runs = [_read_run(path, label) for path, label in zip(run_dirs, _labels(run_dirs), strict=True)]
    folder = run_dirs[0] / REPORT
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    pictures = [picture for name, draw in _drawings().items() if (picture := _save(draw(runs), folder / f"{name}.png"))]
    replace_text(folder / PAGE, _page(runs, pictures))
    return folder / PAGE


# --- reading ----------------------------------------------------------------------------------------------------------


def _labels(run_dirs: list[Path]) -> list[str]:
    names = [path.resolve().name for path in run_dirs]
    return names if len(set(names)) == len(names) else [str(path) for path in run_dirs]


def _read_run(path: Path, label: str) -> Run:
    rows = RunFolder(path).metrics()
    config = path / "config.yaml"
    return Run(label, path, rows, config.read_text() if config.is_file() else "")


# --- drawing ----------------------------------------------------------------------------------------------------------


def _drawings() -> dict[str, Callable[[list[Run]], Figure | None]]:
    """File name -> what draws it (None: no run has the numbers), in the order of the page."""
    drawings = {name: lambda runs, panels=panels: _draw_panels(runs, panels) for name, panels in FIGURES.items()}
    return {"loss": drawings.pop("loss"), "loss_by_t": _draw_by_t, **drawings}


def _draw_panels(runs: list[Run], panels: tuple[Panel, ...]) -> Figure | None:
    panels = tuple(panel for panel in panels if any(len(_both(run, panel)[0]) for run in runs))
    if not panels:
        return None
    figure = Figure(figsize=(8, 0.6 + 3.2 * len(panels)), dpi=130, layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        for index, run in enumerate(runs):
            _draw_run(axes, run, panel, index, several=len(runs) > 1)
        _finish(axes, panel)
    return figure


def _both(run: Run, panel: Panel) -> Curve:
    """The training curve, or else the held-out one: empty if there is neither."""
    curve = run.curve(panel.metric)
    return curve if len(curve[0]) or panel.held_out is None else run.curve(panel.held_out)


def _draw_run(axes: Axes, run: Run, panel: Panel, index: int, several: bool) -> None:
    colour, style = COLOURS[index % len(COLOURS)], LINES[index % len(LINES)]
    steps, values = run.curve(panel.metric)
    training, smoothed = _label(run, "training", several), smooth(values)
    if len(steps) and (panel.exact or smoothed is None):
        axes.plot(steps, values, style, color=colour, linewidth=1.6, marker=_marker(steps), label=training)
    elif len(steps):
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35, label=f"{training}, each step")
        axes.plot(steps, smoothed, style, color=colour, linewidth=1.8, label=f"{training}, smoothed")
    if panel.held_out is not None and len((held_out := run.curve(panel.held_out))[0]):
        colour, label = (colour if several else COLOURS[1]), _label(run, "held out", several)
        axes.plot(*held_out, ":", color=colour, linewidth=1.4, marker="D", markersize=4.5, label=label)


def _label(run: Run, text: str, several: bool) -> str:
    return f"{run.label}: {text}" if several else text


def _draw_by_t(runs: list[Run]) -> Figure | None:
    """Held-out loss at each mask ratio t: dark is little noise; runs differ by line style."""
    names = sorted({name for run in runs for row in run.rows for name in row if EVAL_BY_T.fullmatch(name)})
    if not names:
        return None
    figure = Figure(figsize=(8, 3.8), dpi=130, layout="constrained")
    axes = figure.subplots()
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(names)))
    for index, run in enumerate(runs):
        for name, shade in zip(names, shades, strict=True):
            label = _label(run, f"t = {float(EVAL_BY_T.fullmatch(name)[1]):g}", several=len(runs) > 1)
            axes.plot(*run.curve(name), LINES[index % len(LINES)], color=shade, marker="o", markersize=4, label=label)
    _finish(axes, Panel("held-out loss by mask ratio t", ""))
    return figure


def _finish(axes: Axes, panel: Panel) -> None:
    axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("optimiser step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    values = np.concatenate([line.get_ydata() for line in axes.lines])
    if panel.log and (values > 0).all() and values.max() > 20 * values.min():
        axes.set_yscale("log")
    elif panel.from_zero:
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", scilimits=(-3, 6))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.lines) > 1:
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=3.5)


def smooth(values: np.ndarray) -> np.ndarray | None:
    """Centred moving mean whose window shrinks at the ends; None where there is too little to smooth."""
    half = len(values) // (2 * SMOOTH_SHARE)
    if half == 0:
        return None
    kernel = np.ones(2 * half + 1)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _marker(steps: np.ndarray) -> str | None:
    return "." if len(steps) <= 2 * SMOOTH_SHARE else None


def _save(figure: Figure | None, file: Path) -> Path | None:
    if figure is not None:
        figure.savefig(file)
        return file
    return None


# --- the page ---------------------------------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } img { max-width: 100%; } div.wide { overflow-x: auto; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 13px; }
"""


HELD_OUT_NUMBERS = {
    "held-out loss": "eval/loss",
    "held-out hit rate": "eval/hit_rate",
    "tokens per forward": "eval/tokens_per_forward",
    "exact match": "eval/exact_match",
}


def final_numbers(run: Run) -> dict[str, str]:
    """The last line of a run, as a person reads it."""
    steps, _ = run.curve("loss")
    numbers = {"steps": f"{int(max(run.rows[-1]['step'], *steps, 0)):,}"}
    for title, metric in (("training loss", "loss"), ("training hit rate", "hit_rate")):
        if len(values := run.curve(metric)[1]):
            numbers[title] = f"{values[-math.ceil(len(values) / TAIL_SHARE) :].mean():.4f}"
    for title, metric in HELD_OUT_NUMBERS.items():
        if len(values := run.curve(metric)[1]):
            numbers[title] = f"{values[-1]:.4f}"
    for title, metric in (("tokens", "tokens"), ("seconds", "seconds")):
        if len(values := run.curve(metric)[1]):
            numbers[title] = f"{values.sum():,.0f}"
    if len(values := run.curve("tokens_per_second")[1]):
        numbers["tokens per second (median)"] = f"{np.median(values):,.0f}"
    return numbers


def _page(runs: list[Run], pictures: list[Path]) -> str:
    title = html.escape(" and ".join(run.label for run in runs))
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"]
    parts += [f"<h1>{title}</h1>", _table(runs)]
    parts.append(
        f"<p>Training numbers are means over the last 1/{TAIL_SHARE} of the steps, held-out ones the last.</p>"
    )
    for picture in pictures:
        data = base64.b64encode(picture.read_bytes()).decode()
        name = picture.stem.replace("_", " ")
        parts.append(f'<h2>{name}</h2><img alt="{name}" src="data:image/png;base64,{data}">')
    for run in runs:
        parts.append(f"<h2>recipe of {html.escape(run.label)}, resolved</h2><pre>{html.escape(run.config)}</pre>")
    return "\n".join(parts) + "\n</html>\n"


def _table(runs: list[Run]) -> str:
    columns = [final_numbers(run) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    head = "".join(f"<th>{html.escape(run.label)}</th>" for run in runs)
    rows = [f"<tr><td>{name}</td>{_cells(column.get(name, '') for column in columns)}</tr>" for name in names]
    return f"<div class=wide><table><tr><th></th>{head}</tr>{''.join(rows)}</table></div>"


def _cells(texts: Iterable[str]) -> str:
    return "".join(f"<td>{text}</td>" for text in texts)
