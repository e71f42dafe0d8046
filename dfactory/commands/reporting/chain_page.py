"""The page of a chain of runs: a table of all stages on top, then a section for each with the curves that matter there."""

import base64
import html
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dfactory.commands.reporting.chain import Chain, Link
from dfactory.commands.reporting.figures import FIGURES, draw_by_t, draw_panels
from dfactory.commands.reporting.numbers import CURVES, HOW_IT_RAN, changes, data_of
from dfactory.commands.reporting.page import CAPTIONS, POLICY, VIEWPORT, first_and_last, last_words
from dfactory.commands.reporting.runs import Run, read_objects
from dfactory.runs.evaluations import evaluations_of
from dfactory.runs.folder import PREVIEWS
from dfactory.runs.lineage import Base, Evaluation, Result, Training

SIZE = (5.0, 2.9)  # inches of a picture: two stand beside each other, one on a phone
PREVIEWS_SHOWN = 4
LONGEST_TEXT = 600  # characters of a prompt or an answer
PERCENT = ("exact_match", "errors repaired", "answers restored")
STYLE = Path(__file__).parents[2] / "assets/chain.css"


class Picture:
    """A drawn figure as a name and a PNG."""

    def __init__(self, name: str, title: str, figure: Figure):
        self.name, self.title, self.figure = name, title, figure


def pictures_of(run: Run) -> tuple[list[Picture], list[Picture]]:
    """The curves that matter in a run's stage, a picture a panel; and those of how it ran."""
    main = [*_panels(run, CURVES[data_of(run)]), *_by_t(run)]
    return main, _panels(run, HOW_IT_RAN)


def _panels(run: Run, names: Iterable[str]) -> list[Picture]:
    drawn = [(name, panel, draw_panels([run], (panel,), SIZE)) for name in names for panel in FIGURES[name]]
    return [Picture(name, panel.title, figure) for name, panel, figure in drawn if figure is not None]


def _by_t(run: Run) -> list[Picture]:
    figure = draw_by_t([run], SIZE) if "loss" in CURVES[data_of(run)] else None
    return [] if figure is None else [Picture("loss_by_t", "held-out loss by mask ratio t", figure)]


Drawn = list[tuple[Picture, bytes]]  # with its PNG


def chain_page(chain: Chain, drawn: list[tuple[Drawn, Drawn]], tradeoff: bytes | None) -> str:
    """`drawn`: for each link the pictures of its section."""
    stages = [*(training.stage for training in chain.earlier), *(link.run.stage for link in chain.links)]
    title = html.escape((" \N{RIGHTWARDS ARROW} " if chain.is_a_line else ", ").join(stages))
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8>{VIEWPORT}{POLICY}<title>{title}</title>"]
    parts += [
        f"<style>{STYLE.read_text()}</style><h1>{title}</h1>",
        _from(chain.base),
        _summary(chain),
        _evaluations(chain),
    ]
    if tradeoff is not None:
        parts.append(f"<h3>exact match against tokens per forward</h3>{_image('trade-off', tradeoff)}")
        parts.append(f'<p class="note">{html.escape(CAPTIONS["tradeoff"])}</p>')
    told: set[str] = set()  # captions stand where their picture comes first
    for number, (link, pictures) in enumerate(zip(chain.links, drawn, strict=True), start=1):
        parts.append(_section(number, link, *pictures, told))
    return "\n".join([*parts, "</html>\n"]).encode(errors="replace").decode()  # lone surrogates cannot be encoded


# --- on top ------------------------------------------------------------------------------------------------------------


def _from(base: Base | None) -> str:
    if base is None:
        return ""
    at = f" at {base.revision[:12]}" if base.revision else ""
    return f'<p class="note">from {html.escape(base.name + at)}</p>'


def _summary(chain: Chain) -> str:
    rows = [_earlier_row(training) for training in chain.earlier]
    rows += [_row(number, link) for number, link in enumerate(chain.links, start=1)]
    names = ("stage", "from", "steps", "time of the steps", "tokens", "first \N{RIGHTWARDS ARROW} last")
    note = (
        "Held-out numbers: first and last evaluation of the run. Training numbers: means over the first and the last tenth "
        "of its steps."
    )
    return f'{_table(names, rows)}<p class="note">{note}</p>'


def _from_to(first: str, last: str) -> str:
    """`first -> last`; of a number that was measured once, that one."""
    return " \N{RIGHTWARDS ARROW} ".join(filter(None, (first, last)))


def _row(number: int, link: Link) -> list[str]:
    run = link.run
    tokens, seconds = (run.curve(name)[1].sum() for name in ("tokens", "seconds"))
    steps = max(row["step"] for row in run.rows)
    moved = "<br>".join(
        f"<small>{html.escape(title)}</small> {_from_to(first, f'<b>{last}</b>')}"
        for title, (first, last) in changes(run).items()
    )
    name = (
        f'<span><a href="#stage-{number}">{html.escape(run.stage)}</a> <small>{html.escape(run.label)}</small></span>'
    )
    source = html.escape(link.source)
    return [name, source, f"{steps:,.0f}", _time(seconds), f"{tokens:,.0f}", f"<span>{moved}</span>" if moved else ""]


def _unlike(label: str, stage: str, before: str = "") -> str:
    """The label of a run where it tells more than its stage."""
    return "" if label == stage else before + label


def _earlier_row(training: Training) -> list[str]:
    name = f"<span>{html.escape(training.stage)} <small>{html.escape(training.run)}, by its record</small></span>"
    tokens = "" if training.tokens is None else f"{training.tokens:,.0f}"
    seconds = "" if training.seconds is None else _time(training.seconds)
    return [name, html.escape(training.source.name), f"{training.step:,}", seconds, tokens, ""]


def _evaluations(chain: Chain) -> str:
    """What `dfactory eval` recorded, a table for each set of questions, so that stages stand below each other."""
    asked: dict[tuple, list[tuple[str, Evaluation]]] = {}
    recorded = [(training.run, training.evaluations) for training in chain.earlier]
    recorded += [(link.run.label, evaluations_of(link.run.path)) for link in chain.links]
    for label, evaluations in recorded:
        for one in evaluations:
            parts = tuple(dict.fromkeys(result.part for result in one.results))
            asked.setdefault((one.data, one.sha256, str(sorted(one.decode.items())), parts), []).append((label, one))
    return "".join(_evaluation(found) for found in asked.values())


def _evaluation(found: list[tuple[str, Evaluation]]) -> str:
    first = found[0][1]
    keys = ", ".join(f"{name}={value}" for name, value in first.decode.items())
    results = [result for _, one in found for result in one.results if not result.part]
    by_part = not results
    metrics = list(dict.fromkeys(r.metric for _, one in found for r in one.results if by_part or not r.part))
    rows = []
    for label, one in found:
        for part in dict.fromkeys(result.part for result in one.results if by_part or not result.part):
            numbers = {result.metric: result for result in one.results if result.part == part}
            count = max((r.records or 0 for r in numbers.values()), default=0)
            at = f"step {one.step:,}" + (f", {part}" if part else "")
            name = f"<span>{html.escape(label)} <small>{html.escape(at)}</small></span>"
            rows.append([name, f"{count:,}", *(_result(numbers.get(metric)) for metric in metrics)])
    head = f"<h3>dfactory eval: {html.escape(first.data)}</h3><p class='note'>{html.escape(keys)}</p>"
    commands = "\n".join(f"{one.date}  {one.command}" for _, one in found)
    shown = f"<details><summary>commands</summary><pre>{html.escape(commands)}</pre></details>"
    return head + _table(("after", "records", *(metric.replace("_", " ") for metric in metrics)), rows) + shown


def _result(result: Result | None) -> str:
    if result is None:
        return ""
    form = "{:.1%}" if result.metric in PERCENT else "{:,.3f}" if abs(result.value) < 100 else "{:,.0f}"
    text = f"<b>{form.format(result.value)}</b>"
    if result.low is not None and result.high is not None:
        text += f" <small>{form.format(result.low)} to {form.format(result.high)}</small>"
    return f"<span>{text}</span>"


# --- a stage -----------------------------------------------------------------------------------------------------------


def _section(number: int, link: Link, main: Drawn, others: Drawn, told: set[str]) -> str:
    run = link.run
    head = f"<h2>{number}. {html.escape(run.stage)}{html.escape(_unlike(run.label, run.stage, ': '))}</h2>"
    tiles = [
        f"<div class=tile><span>{html.escape(title)}</span><b>{_from_to(first, last)}</b></div>"
        for title, (first, last) in changes(run).items()
    ]
    parts = [f'<section id="stage-{number}">{head}<p class="note">from {html.escape(link.source)}</p>']
    parts += [f"<div class=tiles>{''.join(tiles)}</div>", _figures(main)]
    captions = dict.fromkeys(picture.name for picture, _ in main if picture.name in CAPTIONS.keys() - told)
    told.update(captions)
    parts += [f'<p class="note">{html.escape(CAPTIONS[name])}</p>' for name in captions]
    parts += [_previews(run), _samples(run)]
    if others:
        parts.append(f"<details><summary>how it ran</summary>{_figures(others)}</details>")
    parts.append(
        f"<details><summary>recipe, resolved</summary><pre>{html.escape(run.config)}</pre></details></section>"
    )
    return "\n".join(parts)


def _figures(drawn: Drawn) -> str:
    shown = "".join(f"<figure>{_image(picture.title, png)}</figure>" for picture, png in drawn)
    return f"<div class=figures>{shown}</div>"


def _image(alt: str, png: bytes) -> str:
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _previews(run: Run) -> str:
    """The first held-out prompts as they were answered at the first evaluation and at the last."""
    file = run.path / PREVIEWS
    rows = read_objects(file) if file.is_file() else []
    if not rows:
        return ""
    first, last = ([row for row in rows if row["step"] == step] for step in (rows[0]["step"], rows[-1]["step"]))
    cells = [
        [_clipped(last_words(one["prompt"])), _clipped(one["expected"]), *map(_answer, pair)]
        for one, pair in zip(last, zip(first, last, strict=False), strict=False)
    ][:PREVIEWS_SHOWN]
    names = ("prompt", "expected", f"at step {rows[0]['step']:,}", f"at step {rows[-1]['step']:,}")
    return f"<h3>held-out prompts, as they were answered</h3>{_table(names, cells, 'text')}"


def _samples(run: Run) -> str:
    """Rollouts of the first steps and the last, with their rewards."""
    rows = [
        [
            f"{row['step']:,}",
            *(html.escape(str(one)) for one in (last_words(row["prompt"]), row["completion"], row["reward"])),
        ]
        for row in first_and_last(run.completions())
    ]
    names = ("step", "prompt", "completion", "reward")
    return f"<h3>rollouts of the first steps and the last</h3>{_table(names, rows, 'text')}" if rows else ""


def _answer(row: dict[str, Any]) -> str:
    return f'<span class="{"right" if row["right"] else "wrong"}">{_clipped(row["answered"])}</span>'


def _clipped(value: Any) -> str:
    text = str(value)
    return html.escape(text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} ... ({len(text):,} characters)")


def _table(names: Iterable[str], rows: list[list[str]], kind: str = "") -> str:
    """`rows` hold HTML; on a phone a cell shows its column's name."""
    names = list(map(html.escape, names))
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(
        "<tr>"
        + "".join(f'<td data-label="{name}">{cell}</td>' for name, cell in zip(names, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _time(seconds: float) -> str:
    hours, minutes = divmod(round(seconds) // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{seconds / 60:.1f} min" if minutes else f"{seconds:.0f} s"
