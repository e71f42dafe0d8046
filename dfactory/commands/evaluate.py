"""`dfactory eval`: how often a model answers right, with a confidence interval, and how many forwards that takes.

Questions are records with an `answer` (--data; right is the same text), or those of reasoning-gym's tasks (--task; right is
a full score by the task's own scorer, and the mean score is printed too). --answer-pattern says which part of a response
is its answer. --sweep asks all of them at each of several
values of a decode key, and writes one line per value for the report to draw; --thresholds does it for the first key of the
default decoding rule.
"""

import argparse
import difflib
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console
from rich.table import Table

from dfactory.commands.arguments import model_of
from dfactory.commands.generate import answered, matches, output_of, write_outputs
from dfactory.commands.measured import keep, parted, shares
from dfactory.commands.reporting.runs import sweep_file
from dfactory.console import plain_console
from dfactory.data.answers import answer_in, compiled_pattern
from dfactory.data.prompts import Row, read_rows
from dfactory.decoding.keys import DecodeKeys
from dfactory.decoding.rules.base import default_rule
from dfactory.errors import ConfigError, DataError
from dfactory.inference import Pipeline
from dfactory.rl.rewards.reasoning_gym import score
from dfactory.rl.rewards.text import answer_text
from dfactory.runs.lineage import Result

NORMAL_QUANTILE = 1.96  # two-sided 95 percent
FULL_SCORE = 1 - 1e-9

Score = Callable[[dict[str, Any]], float]  # of an output line, 0 to 1


class Tally(NamedTuple):
    """What became of some questions at one way of decoding."""

    scores: list[float]
    tokens: int
    forwards: int
    seconds: float

    @property
    def hits(self) -> int:
        return sum(score >= FULL_SCORE for score in self.scores)

    @property
    def exact_match(self) -> float:
        return self.hits / len(self.scores)

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / max(self.forwards, 1)

    @property
    def is_graded(self) -> bool:
        """Whether a scorer knows more than right and wrong."""
        return any(0 < value < FULL_SCORE for value in self.scores)

    @property
    def mean_score(self) -> float:
        return sum(self.scores) / len(self.scores)

    def results(self) -> list[Result]:
        """What is recorded."""
        count = len(self.scores)
        graded = [Result("mean_score", self.mean_score, records=count)] if self.is_graded else []
        return [
            shares("exact_match", self.hits, count, wilson_interval(self.hits, count)),
            *graded,
            Result("tokens_per_forward", self.tokens_per_forward, records=count),
        ]

    def speed(self) -> Result:
        return Result("tokens_per_second", self.tokens / self.seconds, records=len(self.scores))

    def cells(self) -> list[str]:
        """Of a table: exact match, its interval, tokens per forward, forwards."""
        low, high = wilson_interval(self.hits, len(self.scores))
        shares = [f"{self.exact_match:.1%}", f"{low:.1%} .. {high:.1%}"]
        return [*shares, f"{self.tokens_per_forward:.2f}", f"{self.forwards}"]


def evaluate(arguments: argparse.Namespace, keys: DecodeKeys) -> int:
    console = plain_console()
    rows, score = _questions(arguments, keys)
    pipeline = Pipeline(**model_of(arguments), keys=keys)
    if pipeline.vocabulary.tokenizer is None:
        raise ConfigError(f"{arguments.model} has no tokenizer: there is no text to compare with an answer")
    if arguments.thresholds or arguments.sweep:
        key, over = _sweep_of(arguments, pipeline)
        sweep = [(value, _tally(_ask(over[value], rows, console), score)) for value in over]
        console.print(_sweep_table(key, sweep))
        file = _sweep_file(arguments, key)
        if file is not None:
            write_outputs(file, [_sweep_line(key, *point) for point in sweep])
            console.print(f"written: {file}", soft_wrap=True)
        points = [(f"{key}={value}", tally) for value, tally in sweep]
        results = [one for part, tally in points for one in parted([*tally.results(), tally.speed()], part)]
        keep(arguments, pipeline.keys, results)
        return 0
    asked = _ask(pipeline, rows, console)
    if arguments.output:
        write_outputs(Path(arguments.output), asked.outputs)
    tallies = _by_task(asked, score)
    console.print(_table(tallies))
    results = [one for task, tally in tallies.items() for one in parted(tally.results(), task)]
    keep(arguments, pipeline.keys, [*results, tallies[""].speed()])
    return 0


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """95 percent confidence interval of a share, after Wilson: sane near 0 and 1 and for few records."""
    z2 = NORMAL_QUANTILE**2
    centre = (hits + z2 / 2) / (count + z2)
    half = NORMAL_QUANTILE * math.sqrt(hits * (count - hits) / count + z2 / 4) / (count + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


# --- questions ---------------------------------------------------------------------------------------------------------


def _questions(arguments: argparse.Namespace, keys: DecodeKeys) -> tuple[list[Row], Score]:
    pattern = compiled_pattern(arguments.answer_pattern, "--answer-pattern")
    if arguments.task:
        return task_questions(arguments.task, arguments.count, keys.seed, pattern)
    rows = read_rows(arguments.data)
    for row in rows:
        try:
            answer_text(row.fields.get("answer"))
        except ValueError as problem:
            raise DataError(f"{row.origin} has no answer to compare the response with: {problem}") from problem
    return rows, lambda output: float(matches(output, pattern))


def task_questions(
    names: list[str], count: int, seed: int, pattern: re.Pattern | None = None
) -> tuple[list[Row], Score]:
    """`count` questions of each of reasoning-gym's tasks, a function of the seed, and their scorers."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as problem:
        raise ConfigError(f"--task: {problem}: pip install 'dfactory[rl]'") from problem
    unknown = [name for name in names if name not in DATASETS]
    if unknown:
        near = difflib.get_close_matches(unknown[0], DATASETS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(DATASETS))}"
        raise ConfigError(f"--task {unknown[0]}: reasoning-gym has no such task; {hint}")
    rows = []
    for name in names:
        for index, entry in enumerate(reasoning_gym.create_dataset(name, size=count, seed=seed)):
            messages = [{"role": "user", "content": entry["question"]}]
            fields = {"messages": messages, "answer": entry["answer"], "metadata": entry["metadata"], "task": name}
            rows.append(Row(f"{name}:{index}", fields | {"question": entry["question"]}))
    return rows, lambda output: score(output["task"], answer_in(output["text"], pattern).strip(), output)


# --- answers -----------------------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    outputs: list[dict[str, Any]]
    seconds: float


def _ask(pipeline: Pipeline, rows: list[Row], console: Console) -> Asked:
    started = time.perf_counter()
    outputs = [output_of(*answer) for answer in answered(pipeline, rows, console)]
    return Asked(outputs, time.perf_counter() - started)


def _tally(asked: Asked, score: Score) -> Tally:
    outputs = asked.outputs
    tokens = sum(len(output["output_ids"]) for output in outputs)
    forwards = sum(output["forwards"] for output in outputs)
    return Tally([score(output) for output in outputs], tokens, forwards, asked.seconds)


# --- what is shown -----------------------------------------------------------------------------------------------------


def _by_task(asked: Asked, score: Score) -> dict[str, Tally]:
    """Of each task where there are several, then of all under the name ""."""
    by_task = defaultdict(list)
    for output in asked.outputs:
        by_task[str(output.get("task", ""))].append(output)
    parts = {task: by_task[task] for task in sorted(by_task)} if len(by_task) > 1 else {}
    return {task: _tally(Asked(part, asked.seconds), score) for task, part in (parts | {"": asked.outputs}).items()}


def _table(tallies: dict[str, Tally]) -> Table:
    table = Table("", "records", "exact\nmatch", "95% interval", "tokens /\nforward", "forwards", title="evaluation")
    _align(table)
    for task, tally in tallies.items():
        if task:
            table.add_row(task, str(len(tally.scores)), *tally.cells())
    table.add_section()
    whole = tallies[""]
    table.add_row("all", str(len(whole.scores)), *whole.cells(), style="bold")
    table.caption = f"{whole.tokens} tokens in {whole.seconds:.1f} s, {whole.tokens / whole.seconds:,.0f} per second"
    if whole.is_graded:
        table.caption += f"; mean score {whole.mean_score:.3f}"
    return table


def _align(table: Table) -> None:
    """Numbers to the right, and no cell broken."""
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"


def _sweep_of(arguments: argparse.Namespace, pipeline: Pipeline) -> tuple[str, dict[Any, Pipeline]]:
    """The decode key, and for each of its values what decodes with it. A wrong one is refused before anything is decoded."""
    if arguments.thresholds:
        key, values, origin = default_rule().dial(), arguments.thresholds, "--thresholds"
    else:
        (key, words), origin = arguments.sweep, "--sweep"
        values = [yaml.safe_load(word) for word in words]
    return key, {value: pipeline.over({key: value}, origin) for value in values}


def _sweep_table(key: str, sweep: list[tuple[Any, Tally]]) -> Table:
    columns = ["exact\nmatch", "95% interval", "tokens /\nforward", "forwards", "tokens /\nsecond"]
    table = Table(key, *columns, title=f"evaluation of {len(sweep[0][1].scores)} records")
    _align(table)
    for value, tally in sweep:
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        table.add_row(shown, *tally.cells(), f"{tally.tokens / tally.seconds:,.0f}")
    return table


def _sweep_line(key: str, value: Any, tally: Tally) -> dict[str, Any]:
    low, high = wilson_interval(tally.hits, len(tally.scores))
    swept = {} if key == default_rule().dial() else {"swept": key}
    return {
        **swept,
        key: value,
        "exact_match": tally.exact_match,
        "exact_match_low": low,
        "exact_match_high": high,
        "records": len(tally.scores),
        "tokens_per_forward": tally.tokens_per_forward,
        "forwards": tally.forwards,
        "tokens_per_second": tally.tokens / tally.seconds,
    }


def _sweep_file(arguments: argparse.Namespace, key: str) -> Path | None:
    """`--output`, or else beside the metrics of the run. None for a plain model directory, which stays as it is."""
    if arguments.output:
        return Path(arguments.output)
    run = Path(arguments.model)
    return run / sweep_file(key) if (run / "LATEST").is_file() else None
