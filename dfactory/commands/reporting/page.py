"""The report page: one self-contained HTML file with the pictures and completions."""

import base64
import html
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dfactory.commands.reporting.figures import PHASES
from dfactory.commands.reporting.runs import Run

TAIL_SHARE = 10  # final training numbers are means over the last 1/10 of the steps
FULL_WIDTH = 1352  # pixels of a picture with two columns
COMPLETIONS_SHOWN = 4  # of the first and of the last steps
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } img { max-width: 100%; } div.wide { overflow-x: auto; }
table.text th, table.text td { text-align: left; vertical-align: top; white-space: pre-wrap; font-size: 13px; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 13px; }
@media (max-width: 44rem) { img { max-width: none; min-width: 40rem; } div.picture { overflow-x: auto; } }
"""
POLICY = (  # besides the escaping: the browser runs no script and fetches nothing
    """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">"""
)
VIEWPORT = '<meta name=viewport content="width=device-width, initial-scale=1">'
CAPTIONS = {
    "loss": "Thin: each step; thick: mean over 1/20 of the steps; diamonds: held out. In RL the training loss stays near 0 "
    "(look at the rewards), and the held-out loss is a likelihood: they are not comparable.",
    "loss_by_t": "A model that learns lowers all of them; the loss at high t is that of the first forwards of decoding.",
    "tradeoff": "From `dfactory eval --sweep` or `--thresholds`. Up and to the right is better.",
    "memory": "The forecast is that of `dfactory check`: an upper bound of what training needs. On a CPU the measured "
    "number is of the whole process, libraries and records included.",
    "phases": "On the first rank. In RL `records or rollouts` holds the wait for rollouts and the sending of weights.",
    "rewards": "Groups whose rewards are all equal teach nothing; few different answers are a sign of collapse.",
}
HELD_OUT_NUMBERS = {
    "held-out loss": "eval/loss",
    "held-out accuracy": "eval/hit_rate",
    "tokens per forward": "eval/tokens_per_forward",
    "exact match": "eval/exact_match",
    "chosen above rejected": "eval/rewards/accuracies",
}


DEVICE_NUMBERS = (
    ("tokens per second of a device (median)", "tokens_per_second_per_device", ",.0f"),
    ("model FLOPs utilisation (median)", "mfu", ".1%"),
)


def final_numbers(run: Run) -> dict[str, str]:
    """A run's final numbers as text, by title."""
    steps, _ = run.curve("loss")
    numbers = {"stage": run.stage, "steps": f"{int(max(run.rows[-1]['step'], *steps, 0)):,}"}
    for title, metric in (("training loss", "loss"), ("training accuracy", "hit_rate"), ("reward", "reward")):
        if len(values := run.curve(metric)[1]):
            numbers[title] = f"{values[-math.ceil(len(values) / TAIL_SHARE) :].mean():.4f}"
    for title, metric in HELD_OUT_NUMBERS.items():
        if len(values := run.curve(metric)[1]):
            numbers[title] = f"{values[-1]:.4f}"
    for title, metric in (("tokens", "tokens"), ("seconds", "seconds")):
        if len(values := run.curve(metric)[1]):
            numbers[title] = f"{values.sum():,.0f}"
    if phases := _phases(run):
        numbers["time by phase"] = phases
    if len(values := run.curve("tokens_per_second")[1]):
        numbers["tokens per second (median)"] = f"{np.median(values):,.0f}"
    for title, metric, form in DEVICE_NUMBERS:
        if len(values := run.curve(metric)[1]):
            numbers[title] = format(np.median(values), form)
    return numbers


def _phases(run: Run) -> str:
    """The share of each phase in the sum of all, from the largest on."""
    sums = {title: run.curve(f"seconds/{name}")[1].sum() for name, title in PHASES.items()}
    whole = sum(sums.values())
    largest = sorted(sums.items(), key=lambda item: -item[1])
    return ", ".join(f"{title} {seconds / whole:.0%}" for title, seconds in largest if seconds) if whole else ""


def page(runs: list[Run], pictures: list[Path]) -> str:
    title = html.escape(" and ".join(run.label for run in runs))
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8>{VIEWPORT}{POLICY}<title>{title}</title><style>{STYLE}</style>"
    ]
    parts += [f"<h1>{title}</h1>", _table(runs)]
    parts.append(
        f"<p>Training numbers are means over the last 1/{TAIL_SHARE} of the steps, held-out ones the last.</p>"
    )
    for picture in pictures:
        png = picture.read_bytes()
        width = min(int.from_bytes(png[16:20]) / FULL_WIDTH, 1)  # so that letters have the same size in all pictures
        name, data = picture.stem.replace("_", " "), base64.b64encode(png).decode()
        caption = f"<p>{html.escape(CAPTIONS[picture.stem])}</p>" if picture.stem in CAPTIONS else ""
        parts.append(
            f'<h2>{name}</h2><div class=picture><img alt="{name}" style="width: {width:.0%}" '
            f'src="data:image/png;base64,{data}"></div>{caption}'
        )
    parts += [_completions(run.label, rows) for run in runs if (rows := run.completions())]
    for run in runs:
        parts.append(f"<h2>recipe of {html.escape(run.label)}, resolved</h2><pre>{html.escape(run.config)}</pre>")
    return "\n".join([*parts, "</html>\n"]).encode(errors="replace").decode()  # lone surrogates cannot be encoded


def _table(runs: list[Run]) -> str:
    columns = [final_numbers(run) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    head = "".join(f"<th>{html.escape(run.label)}</th>" for run in runs)
    rows = [f"<tr><td>{name}</td>{_cells(column.get(name, '') for column in columns)}</tr>" for name in names]
    return f"<div class=wide><table><tr><th></th>{head}</tr>{''.join(rows)}</table></div>"


def _completions(label: str, rows: list[dict[str, Any]]) -> str:
    """What the model writes at the start and at the end of the run."""
    head = "<tr><th>step</th><th>prompt</th><th>completion</th><th>reward</th></tr>"
    lines = "".join(
        f"<tr>{_cells((row['step'], last_words(row['prompt']), row['completion'], row['reward']))}</tr>"
        for row in first_and_last(rows)
    )
    title = f"<h2>completions of {html.escape(label)}</h2>"
    return f"{title}<div class=wide><table class=text>{head}{lines}</table></div>"


def first_and_last(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One rollout of each of the first and last groups."""
    groups: dict[tuple[int, int], dict[str, Any]] = {}
    for row in rows:
        groups.setdefault((row["step"], row["group"]), row)
    chosen = list(groups.values())
    if len(chosen) <= 2 * COMPLETIONS_SHOWN:
        return chosen
    return chosen[:COMPLETIONS_SHOWN] + chosen[-COMPLETIONS_SHOWN:]


def last_words(prompt: str | list[dict[str, Any]]) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _cells(values: Iterable[Any]) -> str:
    return "".join(f"<td>{html.escape(str(value))}</td>" for value in values)
