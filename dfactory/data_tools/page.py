"""A report of titled tables and bars, on a terminal and as one self-contained HTML page."""

import html
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

BAR_WIDTH = 40  # characters

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;
padding:0 1rem;color:#1c2024;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.05rem;margin:1.6rem 0 .3rem}table{border-collapse:collapse}
td,th{padding:.15rem .9rem .15rem 0;text-align:left;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums}
td.b{width:24rem}td.b div{background:#3b6fb6;height:.8em;min-width:1px}code{white-space:pre-wrap;overflow-wrap:anywhere}
.bad{color:#a31515}.good{color:#1a6b2d}.warn{color:#8a5a00}"""


@dataclass
class Section:
    """A title and rows of a name and a number or text; `bars` draws the numbers; `lines` stand below, as they are."""

    title: str
    rows: list[tuple[str, int | str]] = field(default_factory=list)
    bars: bool = False
    lines: list[str] = field(default_factory=list)


@dataclass
class Page:
    title: str
    sections: list[Section]
    warnings: list[str]
    verdict: str
    good: bool


def print_page(page: Page, console: Console) -> None:
    for section in page.sections:
        console.rule(Text(section.title, "bold"), align="left", style="dim")
        _print_rows(section, console)
        for line in section.lines:
            console.print(Text(f"  {line}"), soft_wrap=True)
    console.rule(style="dim")
    for warning in page.warnings:
        console.print(Text.assemble(("warning: ", "bold yellow"), warning), soft_wrap=True)
    console.print(Text(page.verdict, "bold green" if page.good else "bold red"), soft_wrap=True)


def _print_rows(section: Section, console: Console) -> None:
    if any(cell_len(name) > console.width // 2 for name, _ in section.rows):  # a path: a table would break it
        for name, value in section.rows:
            console.print(Text.assemble((name, "dim"), f"  {_shown(value)}"), soft_wrap=True)
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(justify="right" if section.bars else "left")
    grid.add_column(style="blue")
    for name, value in section.rows:
        bar = "█" * round(BAR_WIDTH * _share(section, value)) if section.bars else ""
        grid.add_row(name, _shown(value), bar)
    console.print(grid)


def to_html(page: Page) -> str:
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(page.title)}</title>"]
    parts += [f"<style>{STYLE}</style><h1>{html.escape(page.title)}</h1>"]
    parts += [f"<p class={'good' if page.good else 'bad'}><b>{html.escape(page.verdict)}</b></p>"]
    parts += [f"<p class=warn>warning: {html.escape(warning)}</p>" for warning in page.warnings]
    for section in page.sections:
        rows = "".join(_html_row(section, name, value) for name, value in section.rows)
        lines = "<br>".join(f"<code>{html.escape(line)}</code>" for line in section.lines)
        parts.append(f"<h2>{html.escape(section.title)}</h2><table>{rows}</table>{lines}")
    return "\n".join(parts) + "</html>\n"


def _html_row(section: Section, name: str, value: int | str) -> str:
    bar = f"<td class=b><div style='width:{100 * _share(section, value):.1f}%'></div></td>" if section.bars else ""
    kind = " class=n" if isinstance(value, int) else ""
    return f"<tr><td>{html.escape(name)}</td><td{kind}>{html.escape(_shown(value))}</td>{bar}</tr>"


def _share(section: Section, value: int) -> float:
    return value / max(1, *(number for _, number in section.rows))


def _shown(value: int | str) -> str:
    return f"{value:,}" if isinstance(value, int) else value
