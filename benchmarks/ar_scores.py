"""`dfactory bench ar score`: the exact log-likelihood of held-out responses, beside a diffusion model's ELBO."""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table

from benchmarks.autoregressive import (
    Text,
    by_length,
    check_head,
    read_held_out,
    read_model,
    scores,
    text_of,
    vocabulary_of,
)
from dfactory.commands.generate import write_outputs
from dfactory.console import plain_console
from dfactory.data.prompts import read_rows
from dfactory.errors import ConfigError
from dfactory.models.hub import resolve
from dfactory.models.registry import read_config

ALL = "all"


def add_parser(commands) -> None:
    parser = commands.add_parser("score", help="log-likelihood of held-out responses", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="an autoregressive model's directory")
    parser.add_argument("--data", type=Path, required=True, help="held-out records")
    parser.add_argument("--output", type=Path, help="one line a record: origin, task, logprob, tokens")
    parser.add_argument(
        "--elbo", type=Path, help="what `dfactory eval --elbo-pairs N --output FILE` wrote of the same data"
    )
    parser.set_defaults(run=score)


def score(options: argparse.Namespace) -> int:
    """Print the table by task. A file of --output that is there already is read instead of computed."""
    console = plain_console()
    if options.output and options.output.is_file():
        lines = read_lines(options.output)
    else:
        lines = score_file(options.model, options.data, console)
    if options.output:
        write_outputs(options.output, lines)
    elbo = read_lines(options.elbo) if options.elbo else None
    if elbo is not None:
        check_counts(lines, elbo, options.elbo)
    console.print(table_of(lines, elbo))
    return 0


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def score_file(model_dir: Path, data: Path, console=None) -> list[dict[str, Any]]:
    """A line for each record, in the file's order: `logprob` in nats, of `tokens` response tokens."""
    console = console or plain_console(quiet=True)
    directory = resolve(model_dir)
    vocabulary, model = vocabulary_of(directory), read_model(directory)
    examples = read_held_out(data, vocabulary, read_config(directory).max_position_embeddings)
    texts = [text_of(example, vocabulary.special.eos) for example in examples]
    check_head(model, texts[0])
    task_of = {row.origin: str(row.fields.get("task", "")) for row in read_rows(data)}
    logprobs = [0.0] * len(texts)
    batches = list(by_length(texts))
    for batch in track(batches, "scoring", console=console, disable=not console.is_terminal):
        for index, logprob in zip(batch, sums(model, [texts[index] for index in batch]), strict=True):
            logprobs[index] = logprob
    return [
        {
            "origin": (origin := examples.origin(text.document_id)),
            "task": task_of[origin],
            "logprob": logprob,
            "tokens": int(text.real_T.sum()),
            "unscored": text.unscored,
        }
        for text, logprob in zip(texts, logprobs, strict=True)
    ]


@torch.inference_mode()
def sums(model, texts: list[Text]) -> list[float]:
    """The log-probability of each text's response tokens together, in nats."""
    logprob_N, text_N = scores(model, texts)
    return torch.zeros(len(texts), dtype=torch.float64).index_add(0, text_N, logprob_N.double()).tolist()


def check_counts(lines: list[dict], elbo: list[dict], file: Path) -> None:
    """Raise ConfigError where the ELBO is that of other records, or counts other response tokens."""
    if len(lines) != len(elbo):
        raise ConfigError(
            f"{file} has {len(elbo)} records, and the model scored {len(lines)}: give the same --data to both"
        )
    for ours, theirs in zip(lines, elbo, strict=True):
        mine, other = _line_number(ours), _line_number(theirs)
        if (mine, ours["tokens"]) != (other, theirs["tokens"]):
            raise ConfigError(
                f"{file} has {theirs['tokens']} response tokens of line {other}, and the model scored {ours['tokens']} of "
                f"line {mine}: give the same --data, tokenizer and chat template to both"
            )


def _line_number(line: dict) -> str:
    return line["origin"].rpartition(":")[2]


def table_of(lines: list[dict], elbo: list[dict] | None) -> Table:
    """By task: records, response tokens, nats per token, and with an ELBO the bound, its gap and the tokens of fill."""
    columns = ["records", "response tokens", "nats per token"] + ["ELBO", "gap", "fill"] * (elbo is not None)
    table = Table("", *columns, title="log-likelihood of responses, EOS included")
    for column in table.columns[1:]:
        column.justify = "right"
    rows = defaultdict(list)
    for number, line in enumerate(lines):
        rows[line["task"]].append(number)
    for task in sorted(rows) if len(rows) > 1 else ():
        table.add_row(task, *_cells(rows[task], lines, elbo))
    table.add_section()
    table.add_row(ALL, *_cells(range(len(lines)), lines, elbo))
    if unscored := sum(line["unscored"] for line in lines):
        table.caption = f"{unscored} first tokens have no prediction: they count as tokens of probability 1"
    return table


def _cells(numbers: Iterable[int], lines: list[dict], elbo: list[dict] | None) -> list[str]:
    mine = [lines[number] for number in numbers]
    tokens, nats = sum(line["tokens"] for line in mine), per_token(mine, "logprob")
    cells = [str(len(mine)), f"{tokens:,}", f"{nats:.4f}"]
    if elbo is None:
        return cells
    theirs = [elbo[number] for number in numbers]
    bound = per_token(theirs, "elbo")
    return [*cells, f"{bound:.4f}", f"{nats - bound:.4f}", f"{sum(line['fill'] for line in theirs):,}"]


def per_token(lines: list[dict], name: str) -> float:
    """Nats per response token, over all lines."""
    return sum(line[name] for line in lines) / sum(line["tokens"] for line in lines)
