"""`dfactory bench ar speed`: tokens per second of transformers' autoregressive decoding and of dfactory's, in turn.

Both answer the same prompts on the same machine: `generate` of transformers on the autoregressive weights, and dfactory's
decoder on the diffusion weights at each block size, for each batch size and precision. `fixed`: every answer has
`--new-tokens`, EOS is forbidden. `natural`: answers end with their EOS, and exact match stands beside. Each of the sides
answers once untimed, and then `--rounds` times in turn; numbers are medians, of CPU time and of the clock.

transformers runs its plain best on a CPU: scaled_dot_product_attention, a dynamic cache, left padding, inference mode,
greedy. There is no static cache and no compilation. A batch of one answers prompt after prompt; larger ones fill a batch,
and dfactory as many slots. Further words are decode keys, such as `decode.rule=entropy_bound decode.entropy_bound=0.5`.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track
from rich.table import Table

from benchmarks.ar_answers import batches_of, generate, rows_of
from benchmarks.autoregressive import read_model, vocabulary_of
from dfactory.commands.generate import matches
from dfactory.config.load import parse_overrides
from dfactory.console import plain_console
from dfactory.data.answers import ANSWER_PATTERN_HELP, compiled_pattern
from dfactory.data.prompts import Row, encode_prompt
from dfactory.decoding.keys import DecodeKeys, decode_keys_over
from dfactory.inference import Pipeline
from dfactory.models.hub import resolve

KINDS = {"fixed": True, "natural": False}  # whether EOS is forbidden
TRANSFORMERS = "transformers"


class Side(NamedTuple):
    """One of those that take turns."""

    name: str
    ask: Callable[[list[list[int]]], tuple[list[list[int]], int]]  # prompts -> answers, forwards of all of them
    text: Callable[[list[int]], str | None]


class Round(NamedTuple):
    wall: float  # seconds
    cpu: float  # seconds
    tokens: int
    forwards: int
    right: float  # share


def add_parser(commands) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        "speed", help="beside dfactory's decoder", description=__doc__, formatter_class=formatter
    )
    parser.add_argument("--ar", type=Path, required=True, help="the autoregressive model's directory")
    parser.add_argument("--diffusion", type=Path, required=True, help="a run folder, checkpoint or model directory")
    parser.add_argument("--data", type=Path, required=True, help="records with an `answer`; the first ones are asked")
    parser.add_argument("--output", type=Path, required=True, help="file of JSON lines; the table is beside it, .md")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="(default: 1 16)")
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[1, 8, 16, 32], help="(default: 1 8 16 32)")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--prompts", type=int, help="asked at each batch size (default: 4, or the batch where larger)")
    parser.add_argument("--new-tokens", type=int, default=64, help="of a fixed answer (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=256, help="natural answer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="that are timed (default: %(default)s)")
    parser.add_argument("--answer-pattern", metavar="REGEX", help=ANSWER_PATTERN_HELP)
    parser.set_defaults(run=speed)


def speed(options: argparse.Namespace) -> int:
    """Measure what --output lacks, and print the table."""
    console = plain_console()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in options.output.read_text().splitlines()] if options.output.is_file() else []
    cases = [(d, b, k) for d in options.dtypes for b in options.batches for k in options.kinds]
    missing = [case for case in cases if case not in {(line["dtype"], line["batch"], line["kind"]) for line in done}]
    for case in track(missing, "measuring", console=console, disable=not console.is_terminal):
        lines = measure(*case, options)
        with options.output.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        done += lines
    options.output.with_suffix(".md").write_text(markdown(done))
    console.print(table_of(done))
    return 0


def measure(dtype: str, batch: int, kind: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A line for each side, at one precision, batch size and kind of answer."""
    rows = rows_of(options.data)[: options.prompts or max(batch, 4)]
    sides = sides_of(dtype, batch, KINDS[kind], options)
    prompts = [encode_prompt(row, vocabulary_of(resolve(options.ar)).encoder) for row in rows]
    pattern = compiled_pattern(options.answer_pattern, "--answer-pattern")
    rounds = take_turns(sides, rows, prompts, pattern, options.rounds)
    lines = []
    for name, of_side in rounds.items():
        median = Round(*(statistics.median(column) for column in zip(*of_side, strict=True)))
        numbers = {
            "tokens_per_cpu_second": median.tokens / median.cpu,
            "tokens_per_second": median.tokens / median.wall,
        }
        numbers |= {"tokens_per_forward": median.tokens / median.forwards, "exact_match": median.right}
        case = {"dtype": dtype, "batch": batch, "kind": kind, "side": name, "prompts": len(rows)}
        lines.append(case | numbers | median._asdict())
    return lines


def take_turns(
    sides: list[Side], rows: list[Row], prompts: list[list[int]], pattern, count: int
) -> dict[str, list[Round]]:
    """Each side once untimed, then `count` rounds in turn."""
    rounds: dict[str, list[Round]] = {side.name: [] for side in sides}
    for number in range(count + 1):
        for side in sides:
            wall, cpu = time.perf_counter(), time.process_time()
            answers, forwards = side.ask(prompts)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            outputs = [row.fields | {"text": side.text(ids)} for row, ids in zip(rows, answers, strict=True)]
            right = statistics.fmean(matches(output, pattern) for output in outputs)
            if number > 0:
                rounds[side.name].append(Round(wall, cpu, sum(map(len, answers)), forwards, right))
    return rounds


def sides_of(dtype: str, batch: int, fixed: bool, options: argparse.Namespace) -> list[Side]:
    """transformers', and dfactory's at each block size; all with weights of one precision in memory."""
    keys = DecodeKeys(batch_size=batch, max_new_tokens=options.new_tokens if fixed else options.longest)
    keys = dataclasses.replace(keys, min_new_tokens=options.new_tokens if fixed else 0)
    stated = parse_overrides([word.removeprefix("decode.") for word in options.overrides])
    pipeline = Pipeline(options.diffusion, dtype=dtype, keys=decode_keys_over(keys, dict(stated), "the command line"))
    sides = [autoregressive_side(dtype, batch, keys, options.ar)]
    for size in options.block_sizes:
        sides.append(diffusion_side(f"block size {size}", pipeline.over({"block_size": size})))
    return sides


def autoregressive_side(dtype: str, batch: int, keys: DecodeKeys, model_dir: Path) -> Side:
    directory = resolve(model_dir)
    model, vocabulary = read_model(directory, getattr(torch, dtype)), vocabulary_of(directory)

    def ask(prompts: list[list[int]]) -> tuple[list[list[int]], int]:
        answers: list[list[int]] = [[] for _ in prompts]
        for part in batches_of(list(range(len(prompts))), prompts, batch):
            of_part = [prompts[index] for index in part]
            found = generate(model, vocabulary, of_part, keys.max_new_tokens, keys.min_new_tokens)
            for index, ids in zip(part, found, strict=True):
                answers[index] = ids
        return answers, sum(map(len, answers))  # a forward a token of each answer

    return Side(TRANSFORMERS, ask, vocabulary.text)


def diffusion_side(name: str, pipeline: Pipeline) -> Side:
    def ask(prompts: list[list[int]]) -> tuple[list[list[int]], int]:
        rollouts = pipeline.decode(prompts)
        return [rollout.output_ids for rollout in rollouts], sum(rollout.forwards for rollout in rollouts)

    return Side(name, ask, pipeline.vocabulary.text)


# --- what is shown -----------------------------------------------------------------------------------------------------

COLUMNS = (
    "dtype",
    "batch",
    "kind",
    "side",
    "tokens / CPU s",
    "tokens / s",
    "times AR",
    "tokens / forward",
    "exact match",
)


def cells(line: dict[str, Any], lines: list[dict[str, Any]]) -> list[str]:
    """Of a side's row; `times AR` compares CPU time with transformers' of the same case."""
    case = [line[name] for name in ("dtype", "batch", "kind")]
    base = next(
        o for o in lines if o["side"] == TRANSFORMERS and [o[name] for name in ("dtype", "batch", "kind")] == case
    )
    times = line["tokens_per_cpu_second"] / base["tokens_per_cpu_second"]
    rates = [f"{line[name]:,.1f}" for name in ("tokens_per_cpu_second", "tokens_per_second")]
    right = f"{line['exact_match']:.0%} of {line['prompts']}" if not KINDS[line["kind"]] else ""
    return [*map(str, case), line["side"], *rates, f"{times:.2f}", f"{line['tokens_per_forward']:.2f}", right]


def table_of(lines: list[dict[str, Any]]) -> Table:
    table = Table(*COLUMNS, title=f"decoding, {torch.get_num_threads()} thread(s), medians")
    for line in lines:
        table.add_row(*cells(line, lines))
    return table


def markdown(lines: list[dict[str, Any]]) -> str:
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(cells(line, lines) for line in lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
