"""Run folders that are still written to: their tables are read as they grow, and what a page shows of them.

The data are those of the static report: the curves of figures.py, the final numbers of page.py, completions, recipe.
"""

import dataclasses
import io
import json
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from dfactory.commands.reporting.figures import EVAL_BY_T, FIGURES, Panel, smooth
from dfactory.commands.reporting.memory import METRICS as MEMORY_METRICS
from dfactory.commands.reporting.memory import draw_memory
from dfactory.commands.reporting.numbers import keys_of
from dfactory.commands.reporting.page import CAPTIONS, final_numbers, last_words
from dfactory.commands.reporting.runs import COMPLETIONS, SWEEPS, Run
from dfactory.commands.reporting.tradeoff import draw_tradeoff
from dfactory.redaction import redact
from dfactory.runs.folder import CONFIG, METRICS
from dfactory.runs.ownership import is_running

DEEPEST = 5  # folders below a given one in which runs are looked for
MOST_POINTS = 1500  # of a curve that are sent; of a longer one every k-th
MOST_COMPLETIONS = 20_000  # that are kept, the newest
GROUPS_A_PAGE = 20
PICTURES = {"tradeoff": draw_tradeoff, "memory": draw_memory}


class Table:
    """The rows of a JSONL file, read on as it grows. A file that was replaced or cut (a resumed run does so) is read again
    from its start. A line that is no object is left out, and counted in `bad`."""

    def __init__(self, file: Path, most: int | None = None):
        self.file = file
        self.rows: deque[dict[str, Any]] = deque(maxlen=most)
        self.bad = 0
        self._inode, self._offset = -1, 0

    def read(self) -> None:
        try:
            with self.file.open("rb") as stream:
                self._read(stream, os.fstat(stream.fileno()))
        except FileNotFoundError:
            self._forget(-1)

    def _read(self, stream: io.BufferedReader, found: os.stat_result) -> None:
        if found.st_ino != self._inode or found.st_size < self._offset:
            self._forget(found.st_ino)
        stream.seek(self._offset)
        whole, end, _ = stream.read().rpartition(b"\n")
        self._offset += len(whole) + len(end)
        for line in whole.split(b"\n") if end else ():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                self.rows.append(row)
            else:
                self.bad += 1

    def _forget(self, inode: int) -> None:
        self.rows.clear()
        self.bad, self._inode, self._offset = 0, inode, 0


class WatchedRun:
    """A run folder. `refresh` reads what is new; call it before anything else."""

    def __init__(self, name: str, path: Path):
        self.name, self.path = name, path
        self.metrics, self.completions = Table(path / METRICS), Table(path / COMPLETIONS, MOST_COMPLETIONS)
        self.is_running, self.config = False, ""

    def refresh(self) -> None:
        self.metrics.read()
        self.completions.read()
        self.is_running = is_running(self.path)
        config = self.path / CONFIG
        self.config = redact(config.read_text()) if config.is_file() else ""

    @property
    def run(self) -> Run:
        return Run(self.name, self.path, list(self.metrics.rows), self.config)

    def about(self) -> dict[str, Any]:
        """What a list of runs says of it."""
        rows, keys = self.metrics.rows, keys_of(self.run)
        step = max((row["step"] for row in rows), default=0)
        return {
            "name": self.name,
            "stage": self.run.stage,
            "state": "running" if self.is_running else "finished" if _is_whole(rows, step, keys) else "ended early",
            "step": step,
            "of": keys.get("max_steps"),
            "rows": len(rows),
            "completions": len(self.completions.rows),
            "unreadable": self.metrics.bad + self.completions.bad,
        }

    def report(self) -> dict[str, Any]:
        """All that the static report has of it, as numbers."""
        run = self.run
        pictures = [
            *(["tradeoff"] if any(any(self.path.glob(pattern)) for pattern in SWEEPS) else []),
            *(["memory"] if any(len(run.curve(metric)[0]) for metric in MEMORY_METRICS) else []),
        ]
        return self.about() | {
            "numbers": final_numbers(run) if run.rows else {},
            "figures": [figure for figure in _figures(run) if figure["panels"]],
            "pictures": {name: CAPTIONS[name] for name in pictures},
            "config": run.config,
        }

    def picture(self, name: str) -> bytes | None:
        with matplotlib.rc_context({"text.parse_math": False}):
            figure = PICTURES[name]([self.run])
            if figure is None:
                return None
            file = io.BytesIO()
            figure.savefig(file)
        return file.getvalue()


def _is_whole(rows: deque[dict[str, Any]], step: int, keys: dict[str, Any]) -> bool:
    if keys.get("max_steps"):
        return step >= keys["max_steps"]
    epoch = max((row.get("epoch") or 0 for row in rows), default=0)
    return bool(rows) and epoch >= keys.get("num_train_epochs", 1) - 1e-3


def _figures(run: Run) -> Iterator[dict[str, Any]]:
    for name, panels in FIGURES.items():
        yield {"name": name, "caption": CAPTIONS.get(name, ""), "panels": [*_panels(run, panels)]}
        if name == "loss":
            metrics = sorted({name for row in run.rows for name in row if EVAL_BY_T.fullmatch(name)})
            lines = [_line(run, metric, f"t = {float(EVAL_BY_T.fullmatch(metric)[1]):g}") for metric in metrics]
            panel = _drawn(Panel("held-out loss by mask ratio t", "", log=True), lines)
            yield {"name": "loss_by_t", "caption": CAPTIONS["loss_by_t"], "panels": [panel] if lines else []}


def _panels(run: Run, panels: tuple[Panel, ...]) -> Iterator[dict[str, Any]]:
    for panel in panels:
        lines = [_line(run, panel.metric, "training", smoothed=not panel.exact)]
        if panel.held_out is not None:
            lines.append(_line(run, panel.held_out, "held out"))
        if lines := [line for line in lines if line["steps"]]:
            yield _drawn(panel, lines)


def _drawn(panel: Panel, lines: list[dict[str, Any]]) -> dict[str, Any]:
    return {"title": panel.title, "log": panel.log, "from_zero": panel.from_zero, "lines": lines}


def _line(run: Run, metric: str, label: str, smoothed: bool = False) -> dict[str, Any]:
    steps, values = run.curve(metric)
    mean = smooth(values) if smoothed and len(values) else None
    chosen = slice(None, None, -(-len(steps) // MOST_POINTS) or 1)
    line = {"label": label, "steps": steps[chosen].tolist(), "values": _finite(values[chosen])}
    return line | ({} if mean is None else {"smooth": _finite(mean[chosen])})


def _finite(values: np.ndarray) -> list[float | None]:
    """Six digits of each; None for what JSON does not have."""
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values.tolist()]


# --- completions -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Filter:
    """Which completions to show. A group is shown whole where one of its completions is chosen."""

    low: float | None = None  # reward
    high: float | None = None
    first: int | None = None  # step
    last: int | None = None
    text: str = ""  # in prompt or completion, in any case
    mixed: bool = False  # groups with different rewards: those that teach something
    order: str = "newest"

    def takes(self, row: dict[str, Any]) -> bool:
        reward = row.get("reward")
        if (self.low is not None or self.high is not None) and not isinstance(reward, int | float):
            return False
        bounds = ((row["step"], self.first, self.last), (reward, self.low, self.high))
        if any((low is not None and value < low) or (high is not None and value > high) for value, low, high in bounds):
            return False
        said = f"{last_words(row.get('prompt', ''))}\n{row.get('completion')}"
        return self.text.lower() in said.lower()


ORDERS = ("newest", "oldest", "highest reward", "lowest reward")
COLUMNS = ("completion", "reward", "advantage", "tokens_per_forward", "version")


def completions(rows: deque[dict[str, Any]], chosen: Filter, page: int) -> dict[str, Any]:
    """A page of groups: prompt, and each completion with its rewards."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["step"], row.get("group")), []).append(row)
    kept = [group for group in groups.values() if any(map(chosen.takes, group))]
    if chosen.mixed:
        kept = [group for group in kept if len({str(row.get("reward")) for row in group}) > 1]
    if chosen.order == "newest":
        kept.reverse()
    elif chosen.order != "oldest":
        kept.sort(key=_mean_reward, reverse=chosen.order == "highest reward")
    shown = kept[page * GROUPS_A_PAGE : (page + 1) * GROUPS_A_PAGE]
    return {
        "groups": [_group(group, chosen) for group in shown],
        "found": len(kept),
        "of": len(groups),
        "pages": -(-len(kept) // GROUPS_A_PAGE),
    }


def _mean_reward(group: list[dict[str, Any]]) -> float:
    rewards = [row["reward"] for row in group if isinstance(row.get("reward"), int | float)]
    return sum(rewards) / len(rewards) if rewards else float("-inf")


def _group(group: list[dict[str, Any]], chosen: Filter) -> dict[str, Any]:
    first = group[0]
    named = {"step", "group", "origin", "prompt", *COLUMNS}
    functions = list(dict.fromkeys(name for row in group for name in row if name not in named))
    mean = _mean_reward(group)
    return {
        "step": first["step"],
        "group": first.get("group"),
        "origin": first.get("origin", ""),
        "prompt": last_words(first.get("prompt", "")),
        "mean": mean if np.isfinite(mean) else None,
        "functions": functions,
        "rows": [
            {name: row.get(name) for name in (*COLUMNS, *functions)} | {"chosen": chosen.takes(row)} for row in group
        ],
    }


# --- which runs there are ----------------------------------------------------------------------------------------------


def run_folders(given: list[Path]) -> dict[str, Path]:
    """The run folders in the given ones, or they themselves, by name. Links are not followed."""
    found: dict[str, Path] = {}
    for root in given:
        for path in _below(root):
            name = path.name if path == root else path.relative_to(root).as_posix()
            found[name if name not in found else str(path)] = path
    return found


def _below(root: Path) -> Iterator[Path]:
    for folder, inner, files in os.walk(root):
        if METRICS in files:
            yield Path(folder)
        deep = len(Path(folder).relative_to(root).parts)
        inner[:] = sorted(name for name in inner if deep < DEEPEST and not name.startswith((".", "checkpoint-")))
