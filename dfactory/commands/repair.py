"""`dfactory eval --repair`: does editing repair a wrong token in a right answer, and does it leave right tokens alone?

Each record's own answer is decoded twice from a draft: as it is, and with one token of its text replaced by another, both
drawn uniformly as a function of (decode.seed, document). The decoder does what it does after the last mask of a block: it
edits until nothing changes, for up to max_post_steps forwards a block. Counted at the end, over the tokens of the answer
up to its EOS:

    repaired      the planted token has become the right one
    restored      the whole answer is the right one
    false edits   right tokens that are others now: in answers without an error, and beside a planted one

A token after an EOS that editing put too early counts as changed.
"""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from dfactory.commands.arguments import model_of
from dfactory.commands.elbo import read_examples
from dfactory.commands.evaluate import wilson_interval
from dfactory.commands.generate import write_outputs
from dfactory.commands.measured import keep, shares
from dfactory.console import plain_console
from dfactory.data.examples import Examples
from dfactory.decoding.keys import DecodeKeys
from dfactory.errors import ConfigError, DataError
from dfactory.inference import Pipeline
from dfactory.noise.edit import other_tokens
from dfactory.noise.schedules import Purpose, generator
from dfactory.packing import align
from dfactory.types import Rollout

LONGEST_BLOCKS = 2**20  # of a record; what is too long for the model is not found out here


@dataclasses.dataclass(frozen=True)
class Planted:
    """The last answer of a record, and the error planted in it."""

    origin: str
    prompt_ids: list[int]
    answer_ids: list[int]  # EOS included where the record ends with it
    fill_ids: list[int]  # EOS up to the end of the block
    index: int  # of the error, into answer_ids
    wrong_id: int

    def draft(self, planted: bool) -> list[int]:
        ids = self.answer_ids + self.fill_ids
        return [*ids[: self.index], self.wrong_id, *ids[self.index + 1 :]] if planted else ids

    def changed(self, rollout: Rollout) -> np.ndarray:
        """bool [answer]: where the decoded answer is not the right one."""
        out = rollout.output_ids[: len(self.answer_ids)]
        is_same = np.equal(out, self.answer_ids[: len(out)])
        return ~np.append(is_same, np.zeros(len(self.answer_ids) - len(out), bool))


def repair(arguments: argparse.Namespace, keys: DecodeKeys) -> int:
    if keys.editing_threshold is None:
        raise ConfigError("decode.editing_threshold is null: --repair measures editing; set it, to 0.5 for example")
    pipeline = Pipeline(**model_of(arguments), keys=keys)
    started = time.perf_counter()
    examples = read_examples(arguments.data, pipeline, LONGEST_BLOCKS * pipeline.rules.block_size)
    records = plant(pipeline, examples, keys.seed)
    rollouts = {planted: _decode(pipeline, records, planted) for planted in (False, True)}
    if arguments.output:
        write_outputs(Path(arguments.output), [_output(*row) for row in zip(records, *rollouts.values(), strict=True)])
    console = plain_console()
    console.print(summary(records, rollouts[False], rollouts[True], time.perf_counter() - started))
    found = counts(records, rollouts[False], rollouts[True]).items()
    keep(arguments, pipeline.keys, [shares(n, hits, of, wilson_interval(hits, of)) for n, (hits, of) in found])
    return 0


def plant(pipeline: Pipeline, examples: Examples, seed: int) -> list[Planted]:
    """One error for each record. Raises DataError for a record that does not end with an answer that has text."""
    text_ids = pipeline.vocabulary.special.text_ids(pipeline.vocabulary.size)
    records = []
    for example in (examples[index] for index in range(len(examples))):
        before = np.flatnonzero(~example.trainable_T)
        start = int(before[-1]) + 1 if len(before) else 0
        text = start + np.flatnonzero(np.isin(example.input_ids_T[start:], text_ids))
        if start == 0 or not len(text):
            raise DataError(f"{example.origin} has no prompt with a text answer after it: no error can be planted")
        where, token = generator(seed, example.document_id, 0, 0, Purpose.PLANT).random(2)
        position = text[int(where * len(text))]
        wrong = other_tokens(example.input_ids_T[position : position + 1], np.array([token]), text_ids)
        ids = align(example, pipeline.aligned_block_size, pipeline.vocabulary.special.eos).input_ids_T.tolist()
        length = len(example)
        records.append(
            Planted(example.origin, ids[:start], ids[start:length], ids[length:], int(position) - start, int(wrong[0]))
        )
    return records


def _decode(pipeline: Pipeline, records: Sequence[Planted], planted: bool) -> list[Rollout]:
    drafts = [record.draft(planted) for record in records]
    longest = pipeline.over({"max_new_tokens": max(map(len, drafts))})
    return longest.decode([record.prompt_ids for record in records], drafts=drafts)


def _output(record: Planted, clean: Rollout, planted: Rollout) -> dict[str, Any]:
    return {
        "origin": record.origin,
        "answer_ids": record.answer_ids,
        "planted": {"index": record.index, "right": record.answer_ids[record.index], "wrong": record.wrong_id},
        "output_ids": planted.output_ids,
        "output_ids_without_error": clean.output_ids,
        "forwards": planted.forwards,
    }


def counts(
    records: Sequence[Planted], clean: Sequence[Rollout], planted: Sequence[Rollout]
) -> dict[str, tuple[int, int]]:
    """What is counted -> how often, of how many."""
    changed = [record.changed(rollout) for record, rollout in zip(records, planted, strict=True)]
    falsely = [record.changed(rollout) for record, rollout in zip(records, clean, strict=True)]
    missed = np.array([here[record.index] for record, here in zip(records, changed, strict=True)])
    tokens = sum(map(len, changed))
    beside = int(sum(here.sum() for here in changed) - missed.sum())
    return {
        "errors repaired": (int((~missed).sum()), len(records)),
        "answers restored": (sum(not here.any() for here in changed), len(records)),
        "false edits, answers without an error": (int(sum(here.sum() for here in falsely)), tokens),
        "false edits beside an error": (beside, tokens - len(records)),
    }


def summary(records: Sequence[Planted], clean: Sequence[Rollout], planted: Sequence[Rollout], seconds: float) -> Table:
    table = Table("", "of", "share", "95% interval", title=f"one wrong token in each of {len(records)} right answers")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, (hits, of) in counts(records, clean, planted).items():
        _row(table, name, hits, of)
    forwards = sum(rollout.forwards for rollout in [*clean, *planted])
    tokens = sum(len(record.answer_ids) for record in records)
    table.caption = f"{forwards} forwards for {2 * len(records)} drafts of {tokens} tokens in all, {seconds:.1f} s"
    return table


def _row(table: Table, name: str, hits: int, count: int) -> None:
    low, high = wilson_interval(hits, count)
    table.add_row(name, str(count), f"{hits / count:.2%}", f"{low:.2%} .. {high:.2%}")
