"""Exact match against tokens per forward over a key of the decoding rule: where parallel decoding starts to cost answers."""

from matplotlib.figure import Figure

from dfactory.commands.reporting.figures import COLOURS, LINES, new_figure, titled
from dfactory.commands.reporting.runs import Run, swept_key, swept_value


def draw_tradeoff(runs: list[Run]) -> Figure | None:
    """One line per sweep (before and after CAP, say), one point per value; up and to the right is better."""
    sweeps = {name: rows for run in runs for name, rows in run.sweeps().items() if rows}
    if not sweeps:
        return None
    figure, (axes,) = new_figure(1)
    for index, (name, rows) in enumerate(sweeps.items()):
        colour = COLOURS[index % len(COLOURS)]
        points = [row["tokens_per_forward"] for row in rows], [row["exact_match"] for row in rows]
        axes.plot(*points, LINES[index % len(LINES)], color=colour, marker="o", markersize=5, linewidth=1.6, label=name)
        left = index % 2  # so that the labels of two sweeps do not overlap
        look = {"ha": "right", "va": "top"} if left else {"ha": "left", "va": "bottom"}
        for row, x, y in zip(rows, *points, strict=True):
            offset = (-5, -5) if left else (5, 5)
            value = swept_value(row)
            label = f"{value:g}" if isinstance(value, int | float) else str(value)
            text = axes.annotate(label, (x, y), offset, textcoords="offset points", fontsize=8, **look)
            text.set(color=colour, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.75})
    keys = " and ".join(dict.fromkeys(swept_key(row) for rows in sweeps.values() for row in rows))
    titled(axes, f"exact match against tokens per forward; at the points: {keys}", "tokens per forward")
    axes.set_ylabel("exact match", fontsize=9)
    axes.margins(0.1, 0.15)
    if len(sweeps) > 1:
        axes.legend(fontsize=8, frameon=False, loc="best")
    return figure
