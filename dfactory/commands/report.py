"""`dfactory report`: metrics.jsonl of one or more runs -> RUN/report/ with PNGs and one self-contained HTML file.

Several runs go into one report, by default in the folder of the first. Curves that no run has are left out. With --chain
the page is that of a chain of stages, in the order in which they started from each other, ancestors included: chain.html.
The parts are in reporting/: reading, figures, the trade-off of decoding, memory, the page; chain, numbers, chain_page.
"""

import re
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from dfactory.commands.reporting.chain import read_chain
from dfactory.commands.reporting.chain_page import Picture, chain_page, pictures_of
from dfactory.commands.reporting.figures import drawings
from dfactory.commands.reporting.memory import draw_memory
from dfactory.commands.reporting.page import page
from dfactory.commands.reporting.runs import Run, labels, read_run
from dfactory.commands.reporting.tradeoff import draw_tradeoff
from dfactory.console import plain_console
from dfactory.runs.folder import replace_text, writing

REPORT, PAGE, CHAIN_PAGE = "report", "report.html", "chain.html"


def report(runs: list[str], output: str | None, chain: bool = False) -> int:
    """Draw the curves of the run folders and say where."""
    write = write_chain if chain else write_report
    written = write([Path(run) for run in runs], None if output is None else Path(output))
    plain_console(soft_wrap=True).print(f"{written} and {len(list(written.parent.glob('*.png')))} pictures beside it")
    return 0


def write_report(run_dirs: list[Path], output: Path | None = None) -> Path:
    """Write the report, by default into report/ of the first run; returns its HTML page. Raises DataError where
    metrics.jsonl is missing, empty or broken, CheckpointError where the folder cannot be written."""
    runs = [read_run(path, label) for path, label in zip(run_dirs, labels(run_dirs), strict=True)]
    folder = run_dirs[0] / REPORT if output is None else output
    with writing(folder):
        _write_into(folder, runs)
    return folder / PAGE


def write_chain(run_dirs: list[Path], output: Path | None = None) -> Path:
    """Write the page of the chain that the runs are in, by default into report/ of the first one given; returns the page.
    Raises as `write_report`."""
    chain = read_chain(run_dirs)
    folder = run_dirs[0] / REPORT if output is None else output
    with writing(folder), matplotlib.rc_context({"text.parse_math": False}):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("chain_*.png"):
            old.unlink()
        drawn = []
        for number, link in enumerate(chain.links, start=1):
            sections = pictures_of(link.run)
            files = [[folder / f"chain_{number}_{_slug(one)}.png" for one in section] for section in sections]
            drawn.append(
                tuple(
                    [(one, _save(one.figure, file).read_bytes()) for one, file in zip(*both, strict=True)]
                    for both in zip(sections, files, strict=True)
                )
            )
        tradeoff = _save(draw_tradeoff([link.run for link in chain.links]), folder / "chain_tradeoff.png")
        replace_text(folder / CHAIN_PAGE, chain_page(chain, drawn, tradeoff and tradeoff.read_bytes()))
    return folder / CHAIN_PAGE


def _slug(picture: Picture) -> str:
    return re.sub(r"\W+", "_", f"{picture.name}_{picture.title}")


def _write_into(folder: Path, runs: list[Run]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    draw: dict[str, Callable[[list[Run]], Figure | None]] = drawings() | {
        "tradeoff": draw_tradeoff,
        "memory": draw_memory,
    }
    for name in draw:
        (folder / f"{name}.png").unlink(missing_ok=True)  # of an earlier report
    with matplotlib.rc_context({"text.parse_math": False}):  # a folder's name with a dollar is no formula
        pictures = [picture for name in draw if (picture := _save(draw[name](runs), folder / f"{name}.png"))]
    replace_text(folder / PAGE, page(runs, pictures))


def _save(figure: Figure | None, file: Path) -> Path | None:
    if figure is not None:
        figure.savefig(file)
        return file
    return None
