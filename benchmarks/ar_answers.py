"""`dfactory bench ar answer`: greedy answers of an autoregressive model to held-out prompts, and how many are right."""

import argparse
import re
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table
from transformers import GenerationConfig, PreTrainedModel

from benchmarks.ar_scores import read_lines
from benchmarks.autoregressive import PADDING, read_model, vocabulary_of
from dfactory.commands.evaluate import wilson_interval
from dfactory.commands.generate import matches, write_outputs
from dfactory.console import plain_console
from dfactory.data.answers import ANSWER_PATTERN_HELP, compiled_pattern
from dfactory.data.jsonlines import json_line
from dfactory.data.prompts import Row, encode_prompt, read_rows
from dfactory.errors import DataError
from dfactory.models.hub import resolve
from dfactory.rl.rewards.text import answer_text
from dfactory.vocabulary import Vocabulary


def add_parser(commands) -> None:
    parser = commands.add_parser("answer", help="greedy answers, exact match", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="an autoregressive model's directory")
    parser.add_argument("--data", type=Path, required=True, help="held-out records with an `answer`")
    parser.add_argument("--output", type=Path, required=True, help="one line a record, as of `dfactory eval --output`")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts at a time (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)")
    parser.add_argument("--answer-pattern", metavar="REGEX", help=ANSWER_PATTERN_HELP)
    parser.add_argument("--limit", type=int, help="the first records of the file alone")
    parser.set_defaults(run=answer)


def answer(options: argparse.Namespace) -> int:
    """Answer what --output lacks, then print the table. Raises DataError for a record without an answer."""
    console, pattern = plain_console(), compiled_pattern(options.answer_pattern, "--answer-pattern")
    rows = rows_of(options.data)[: options.limit]
    directory = resolve(options.model)
    vocabulary, partial = vocabulary_of(directory), options.output.with_name(options.output.name + ".started")
    if not options.output.is_file():
        options.output.parent.mkdir(parents=True, exist_ok=True)
        done = {line["index"]: line for line in (read_lines(partial) if partial.is_file() else [])}
        prompts = [encode_prompt(row, vocabulary.encoder) for row in rows]
        batches = batches_of([index for index in range(len(rows)) if index not in done], prompts, options.batch_size)
        model = read_model(directory, getattr(torch, options.dtype))
        with partial.open("ab") as file:
            for batch in track(batches, "answering", console=console, disable=not console.is_terminal):
                for line in answers(model, vocabulary, rows, prompts, batch, options.max_new_tokens):
                    done[line["index"]] = line
                    file.write(json_line(line))
                file.flush()
        write_outputs(options.output, [done[index] for index in range(len(rows))])
        partial.unlink()
    console.print(table_of(read_lines(options.output), pattern))
    return 0


def rows_of(data: Path) -> list[Row]:
    """Records with an answer, as `dfactory eval` reads them."""
    rows = read_rows(data)
    for row in rows:
        try:
            answer_text(row.fields.get("answer"))
        except ValueError as problem:
            raise DataError(f"{row.origin} has no answer to compare the response with: {problem}") from problem
    return rows


def batches_of(indices: list[int], prompts: list[list[int]], size: int) -> list[list[int]]:
    """Prompts of about one length together, the shortest first."""
    order = sorted(indices, key=lambda index: (len(prompts[index]), index))
    return [order[start : start + size] for start in range(0, len(order), size)]


def answers(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    rows: list[Row],
    prompts: list[list[int]],
    batch: list[int],
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """A batch's lines; its CPU time is shared out equally."""
    started = time.process_time()
    outputs = generate(model, vocabulary, [prompts[index] for index in batch], max_new_tokens)
    seconds = (time.process_time() - started) / len(batch)
    return [
        rows[index].fields
        | {"index": index, "output_ids": ids, "text": vocabulary.text(ids), "cpu_seconds": seconds}
        | {"finish_reason": "stop" if ends(ids, vocabulary) else "length"}
        for index, ids in zip(batch, outputs, strict=True)
    ]


def ends(ids: list[int], vocabulary: Vocabulary) -> bool:
    return bool(ids) and ids[-1] in (vocabulary.special.eos, *vocabulary.stop_ids)


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    prompts: list[list[int]],
    max_new_tokens: int,
    min_new_tokens: int = 0,
) -> list[list[int]]:
    """transformers' greedy decoding with its cache, left padded. An answer ends with its EOS."""
    longest = max(map(len, prompts))
    ids_BT = torch.tensor([[PADDING] * (longest - len(prompt)) + prompt for prompt in prompts])
    attended_BT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    stops = [vocabulary.special.eos, *vocabulary.stop_ids]
    out_BT = model.generate(
        input_ids=ids_BT.to(model.device),
        attention_mask=attended_BT.to(model.device),
        generation_config=greedy(stops, max_new_tokens, min_new_tokens),
    )
    return [until_stop(ids, stops) for ids in out_BT[:, longest:].tolist()]


def greedy(stops: list[int], max_new_tokens: int, min_new_tokens: int) -> GenerationConfig:
    """Without the sampling that a model directory may ask for. `min_new_tokens` forbids EOS before that many."""
    least = {"min_new_tokens": min_new_tokens} if min_new_tokens else {}
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stops,
        pad_token_id=PADDING,
        **least,
    )


def until_stop(ids: list[int], stops: list[int]) -> list[int]:
    """An answer without what follows its first stop token."""
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids) - 1)
    return ids[: end + 1]


def table_of(lines: list[dict[str, Any]], pattern: re.Pattern | None = None) -> Table:
    """Exact match by task with its interval, tokens an answer, tokens per second of CPU time."""
    table = Table("", "records", "exact match", "95% interval", "tokens an answer", "tokens / CPU second")
    for column in table.columns[1:]:
        column.justify = "right"
    tasks = sorted({str(line.get("task", "")) for line in lines})
    for task in tasks if len(tasks) > 1 else ():
        table.add_row(task, *_cells([line for line in lines if str(line.get("task", "")) == task], pattern))
    table.add_section()
    table.add_row("all", *_cells(lines, pattern))
    return table


def _cells(lines: list[dict[str, Any]], pattern: re.Pattern | None) -> list[str]:
    hits, tokens = sum(matches(line, pattern) for line in lines), sum(len(line["output_ids"]) for line in lines)
    low, high = wilson_interval(hits, len(lines))
    seconds = sum(line["cpu_seconds"] for line in lines)
    shares = [f"{hits / len(lines):.1%}", f"{low:.1%} .. {high:.1%}"]
    return [str(len(lines)), *shares, f"{tokens / len(lines):.1f}", f"{tokens / seconds:,.0f}"]
