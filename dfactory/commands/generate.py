"""`dfactory generate`: a file of prompts in, its rows as JSONL with their responses out.

A row is a prompt, or a record whose answer is left out (data/prompts.py). Every row is checked before the first one is
decoded, and the output file appears when it is complete. With --keep-trace a line also gets the trace of its decoding, all
that a Rollout holds, and `correct` where it has an `answer`.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from dfactory.commands.arguments import model_of
from dfactory.console import plain_console
from dfactory.data.answers import answer_in
from dfactory.data.jsonlines import json_line
from dfactory.data.prompts import Row, encode_prompt, read_rows
from dfactory.decoding.keys import DecodeKeys
from dfactory.inference import Pipeline
from dfactory.rl.rewards.exact_match import same_text
from dfactory.rl.rewards.text import answer_text
from dfactory.types import Answer


def generate(arguments: argparse.Namespace, keys: DecodeKeys) -> int:
    console = plain_console(stderr=True)
    rows = read_rows(arguments.input)
    pipeline = Pipeline(**model_of(arguments), keys=keys)
    outputs = []
    for row, answer in answered(pipeline, rows, console):
        output = output_of(row, answer)
        outputs.append(output | trace_of(output, answer) if arguments.keep_trace else output)
    write_outputs(Path(arguments.output), outputs)
    forwards = sum(output["forwards"] for output in outputs)
    tokens = sum(len(output["output_ids"]) for output in outputs)
    console.print(
        f"{len(outputs)} responses, {tokens} tokens, {tokens / max(forwards, 1):.2f} per forward: {arguments.output}",
        soft_wrap=True,
    )
    return 0


def answered(pipeline: Pipeline, rows: list[Row], console: Console) -> Iterator[tuple[Row, Answer]]:
    """Rows with their answers, and a progress bar on a terminal."""
    answers = pipeline.answers([encode_prompt(row, pipeline.vocabulary.encoder) for row in rows])
    shown = track(answers, "decoding", total=len(rows), console=console, disable=not console.is_terminal)
    yield from zip(rows, shown, strict=True)


def output_of(row: Row, answer: Answer) -> dict[str, Any]:
    """The input line with what an output line adds."""
    return row.fields | {
        "output_ids": answer.token_ids,
        "text": answer.text,
        "forwards": answer.forwards,
        "tokens_per_forward": answer.tokens_per_forward,
        "finish_reason": answer.finish_reason.value,
    }


def trace_of(output: dict[str, Any], answer: Answer) -> dict[str, Any]:
    """What is needed to replay a decoding; and `correct`, where the line has the text of an answer."""
    rollout = answer.rollout
    trace = {
        "prompt_ids": rollout.prompt_ids,
        "token_ids": rollout.token_ids,
        "commit_step": rollout.commit_step,
        "commit_logprob": rollout.commit_logprob,
        "first_commit_step": rollout.first_commit_step,
        "edits": [edit._asdict() for edit in rollout.edits],
        "block_size": rollout.block_size,
        "block_forwards": rollout.block_forwards,
        "block_origin": rollout.block_origin,
        "masks_left": len(rollout.masks_left),
    }
    if isinstance(output["text"], str) and type(output.get("answer")) in (str, int, float):
        trace["correct"] = matches(output)
    return trace


def matches(output: dict[str, Any], pattern: re.Pattern | None = None) -> bool:
    """The response, or what the pattern captures of it, is the answer, white space at the ends aside. `eval` counts by this
    rule."""
    return same_text(answer_in(output["text"], pattern), answer_text(output["answer"]))


def write_outputs(path: Path, outputs: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(b"".join(map(json_line, outputs)))
    partial.replace(path)
