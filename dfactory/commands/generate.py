"""`dfactory generate`: a file of prompts in, its rows as JSONL with their responses out.

A row is a prompt, or a record whose answer is left out (data/prompts.py). Every row is checked before the first one is
decoded, and the output file appears when it is complete. With --keep-trace a line also gets the trace of its decoding, all
that a Rollout holds, and `correct` where it has an `answer`.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from dfactory.console import plain_console
from dfactory.data.jsonlines import json_line
from dfactory.data.prompts import Row, encode_prompt, read_rows
from dfactory.decoding import decode
from dfactory.decoding.keys import DecodeKeys
from dfactory.models.hub import resolve
from dfactory.models.policy import Policy
from dfactory.models.registry import load_policy, trained_block_size
from dfactory.rl.rewards.exact_match import same_text
from dfactory.rl.rewards.text import answer_text
from dfactory.types import Rollout
from dfactory.vocabulary import read_vocabulary

PROMPTS_AT_ONCE = 512  # prompts handed to the decoder together; slots are refilled among these


class Answerer:
    """A loaded model that answers rows; what `generate` and `eval` share."""

    def __init__(self, arguments: argparse.Namespace, keys: DecodeKeys):
        model_dir = resolve(arguments.model)
        device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.policy: Policy = load_policy(
            model_dir, dtype=arguments.dtype, device=device, init_weights=arguments.init_weights
        )
        self.vocabulary = read_vocabulary(
            arguments.model, mask_token_id=keys.mask_token_id, eos_token_id=keys.eos_token_id
        )
        block_size = keys.block_size or trained_block_size(model_dir)
        self.rules = self.vocabulary.rules(dataclasses.replace(keys, block_size=block_size))

    def answer(self, rows: list[Row], console: Console) -> Iterator[tuple[Row, Rollout]]:
        prompts = [encode_prompt(row, self.vocabulary.encoder) for row in rows]
        starts = range(0, len(rows), PROMPTS_AT_ONCE)
        for start in track(starts, "decoding", console=console, disable=not console.is_terminal):
            part = slice(start, start + PROMPTS_AT_ONCE)
            numbers = range(start, start + len(prompts[part]))
            yield from zip(rows[part], decode(self.policy, prompts[part], self.rules, noise_ids=numbers), strict=True)

    def output(self, row: Row, rollout: Rollout) -> dict[str, Any]:
        return output_of(row, rollout, self.vocabulary.text(rollout.output_ids))


def generate(arguments: argparse.Namespace, keys: DecodeKeys) -> int:
    console = plain_console(stderr=True)
    rows = read_rows(arguments.input)
    answerer = Answerer(arguments, keys)
    outputs = []
    for row, rollout in answerer.answer(rows, console):
        output = answerer.output(row, rollout)
        outputs.append(output | trace_of(output, rollout) if arguments.keep_trace else output)
    write_outputs(Path(arguments.output), outputs)
    forwards = sum(output["forwards"] for output in outputs)
    tokens = sum(len(output["output_ids"]) for output in outputs)
    console.print(
        f"{len(outputs)} responses, {tokens} tokens, {tokens / max(forwards, 1):.2f} per forward: {arguments.output}"
    )
    return 0


def output_of(row: Row, rollout: Rollout, text: str | None) -> dict[str, Any]:
    """The input line with what an output line adds."""
    return row.fields | {
        "output_ids": rollout.output_ids,
        "text": text,
        "forwards": rollout.forwards,
        "tokens_per_forward": rollout.tokens_per_forward,
        "finish_reason": rollout.finish_reason.value,
    }


def trace_of(output: dict[str, Any], rollout: Rollout) -> dict[str, Any]:
    """What is needed to replay a decoding; and `correct`, where the line has the text of an answer."""
    trace = {
        "prompt_ids": rollout.prompt_ids,
        "token_ids": rollout.token_ids,
        "commit_step": rollout.commit_step,
        "commit_logprob": rollout.commit_logprob,
        "first_commit_step": rollout.first_commit_step,
        "edits": [edit._asdict() for edit in rollout.edits],
        "block_size": rollout.block_size,
        "block_forwards": rollout.block_forwards,
    }
    if isinstance(output["text"], str) and type(output.get("answer")) in (str, int, float):
        trace["correct"] = matches(output)
    return trace


def matches(output: dict[str, Any]) -> bool:
    """The response is the answer, white space at the ends aside. `eval` counts by this rule."""
    return same_text(output["text"], answer_text(output["answer"]))


def write_outputs(path: Path, outputs: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(b"".join(map(json_line, outputs)))
    partial.replace(path)
