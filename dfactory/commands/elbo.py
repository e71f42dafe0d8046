"""`dfactory eval --elbo-pairs N`: how likely a model finds the responses of training records, as a bound.

Every record is scored in N complementary pairs of views with exact mask counts, stratified over the pairs, so that the
ELBO is unbiased over all mask ratios (docs/method.md#perplexity-bound). It bounds the likelihood of the response with
the EOS fill of its last block, and so that of the response alone: exp(-ELBO / real tokens) is an upper bound of the
perplexity, and compares across block sizes. Real tokens are those that are trained on, up to and including EOS. The
noise is a function of `decode.seed`.
"""

import argparse
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dfactory.algorithms.elbo import elbo_by_view
from dfactory.commands.arguments import model_of
from dfactory.commands.generate import write_outputs
from dfactory.commands.measured import keep
from dfactory.console import plain_console
from dfactory.data.entries import entry_of
from dfactory.data.examples import Examples, load_examples
from dfactory.data.source import MakeViews, RecordSource
from dfactory.decoding.keys import DecodeKeys
from dfactory.inference import Pipeline
from dfactory.noise import RandomMask
from dfactory.packing import block_of, whole_blocks
from dfactory.runs.lineage import Result
from dfactory.types import AlignedDocument, View

ROW_LENGTH = 8192  # positions that are scored together, unless one record takes more


class Bounds(NamedTuple):
    """The estimates of all documents, in the order of the file."""

    document_id_D: np.ndarray
    tokens_D: np.ndarray  # real response tokens
    fill_D: np.ndarray  # tokens of EOS fill after them, in the ELBO too
    elbo_DN: np.ndarray  # nats; one estimate a pair

    @property
    def elbo_D(self) -> np.ndarray:
        return self.elbo_DN.mean(axis=1)

    @property
    def standard_error_D(self) -> np.ndarray:
        """Of each document's ELBO. Neighbouring pairs stand in for two draws from one slice (collapsed strata), which
        errs on the large side. NaN for a single pair."""
        pairs = self.elbo_DN.shape[1]
        if pairs == 1:
            return np.full(len(self.tokens_D), np.nan)
        return np.sqrt((np.diff(self.elbo_DN, axis=1) ** 2).mean(axis=1) / 2 / pairs)

    @property
    def per_token(self) -> float:
        return self.elbo_D.sum() / self.tokens_D.sum()

    @property
    def error_of_views(self) -> float:
        """Standard error of `per_token` on these documents: what more pairs would lower."""
        return np.sqrt((self.standard_error_D**2).sum()) / self.tokens_D.sum()

    @property
    def error_of_documents(self) -> float:
        """Standard error of `per_token` as a ratio of means over documents, the views' error included."""
        count = len(self.tokens_D)
        residual_D = self.elbo_D - self.per_token * self.tokens_D
        spread = np.sqrt(count / (count - 1)) if count > 1 else np.nan
        return spread * np.sqrt((residual_D**2).sum()) / self.tokens_D.sum()


def evaluate_elbo(arguments: argparse.Namespace, keys: DecodeKeys) -> int:
    console = plain_console()
    pipeline = Pipeline(**model_of(arguments), keys=keys)
    examples = read_examples(arguments.data, pipeline)
    started = time.perf_counter()
    bounds = estimate(pipeline, examples, arguments.elbo_pairs, keys.seed, console)
    if arguments.output:
        write_outputs(Path(arguments.output), _lines(examples, bounds))
    console.print(_table(bounds, time.perf_counter() - started))
    keep(arguments, pipeline.keys, _results(bounds))
    return 0


def read_examples(path: str, pipeline: Pipeline, longest: int | None = None) -> Examples:
    """Training records of any kind, tokenised; one of more than `longest` tokens (default: the model's) is refused."""
    block_size, config = pipeline.aligned_block_size, pipeline.policy.config
    return load_examples(
        [entry_of(path)],
        pipeline.vocabulary.encoder,
        max_length=whole_blocks(longest or config.max_position_embeddings, block_size),
        overlong="refuse",
        on_bad_row="error",
        max_bad_fraction=0.0,
        block_size=block_size,
        eos_id=pipeline.vocabulary.special.eos,
        vocab_size=config.vocab_size,
        mask_id=pipeline.vocabulary.special.mask,
    )


def estimate(
    pipeline: Pipeline,
    examples: Examples,
    pairs: int,
    seed: int,
    console: Console,
    noise_ids: Sequence[int] | None = None,
) -> Bounds:
    """Score every document once, all its views in one row. Documents of one entry of `noise_ids` share their noise, as far
    as all of them reach: their differences have less of it. Default: each has its own."""
    views = RandomMask(
        pipeline.vocabulary.special.mask,
        seed,
        low=0.0,
        high=1.0,
        num_views=pairs,
        complementary=True,
        stratified=True,
        mask_count="exact",
    )
    source = _source(pipeline, examples, views, seed)
    if noise_ids is not None:
        source.make_views = _with_noise_of(views, dict(zip(examples.document_id_E.tolist(), noise_ids, strict=True)))
    parts = list(_scored(pipeline, source, 2 * pairs, console))
    document_id_D, tokens_D, fill_D, elbo_DK = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = document_id_D.argsort()
    elbo_DN = elbo_DK.reshape(-1, pairs, 2).mean(axis=2)
    return Bounds(document_id_D[order], tokens_D[order], fill_D[order], elbo_DN[order])


def _source(pipeline: Pipeline, examples: Examples, views: RandomMask, seed: int) -> RecordSource:
    block_size, num_views = pipeline.aligned_block_size, 2 * views.num_views
    clean_E, response_E = examples.block_counts(block_size)
    size_E = block_of(examples.length_E, block_size, block_size)
    longest = int((size_E * (clean_E + num_views * response_E)).max())
    return RecordSource(
        examples,
        [1.0],
        views,
        num_views=num_views,
        block_size=block_size,
        eos_id=pipeline.vocabulary.special.eos,
        row_length=max(ROW_LENGTH, longest),
        seed=seed,
        max_epochs=1,
    )


def _with_noise_of(views: RandomMask, noise_id_of: dict[int, int]) -> MakeViews:
    """The views that the documents would have under other names."""

    def make_views(document: AlignedDocument, visit: int) -> list[View]:
        return views(dataclasses.replace(document, document_id=noise_id_of[document.document_id]), visit)

    return make_views


@torch.inference_mode()
def _scored(pipeline: Pipeline, source: RecordSource, num_views: int, console: Console) -> Iterator[tuple]:
    """(document_id_D, real response tokens, tokens of fill, ELBO of each view [D, K]) of each row."""
    windows = range(source.num_windows)
    for _ in track(windows, "scoring", console=console, disable=not console.is_terminal):
        for batch in source.next_window():
            moved = batch.to(pipeline.policy.device)
            elbo_DK = elbo_by_view(moved, pipeline.policy(moved).logprob_N, num_views)
            tokens_D, fill_D = batch.answer_length_D, batch.response_length_D - batch.answer_length_D
            yield batch.document_id_D.numpy(), tokens_D.numpy(), fill_D.numpy(), elbo_DK.double().cpu().numpy()


def _lines(examples: Examples, bounds: Bounds) -> list[dict]:
    columns = zip(
        bounds.document_id_D, bounds.elbo_D, bounds.tokens_D, bounds.fill_D, bounds.standard_error_D, strict=True
    )
    return [
        {
            "origin": examples.origin(int(document_id)),
            "elbo": float(elbo),
            "tokens": int(tokens),
            "fill": int(fill),
            "standard_error": None if np.isnan(error) else float(error),
        }
        for document_id, elbo, tokens, fill, error in columns
    ]


def _table(bounds: Bounds, seconds: float) -> Table:
    nats, pairs = bounds.per_token, bounds.elbo_DN.shape[1]
    errors = f"{_number(bounds.error_of_views)} views, {_number(bounds.error_of_documents)} documents"
    table = Table("", "", title="evidence lower bound", show_header=False)
    table.add_row("documents", f"{len(bounds.tokens_D)}")
    table.add_row("response tokens", f"{bounds.tokens_D.sum()}, and {bounds.fill_D.sum()} of fill after them")
    table.add_row("ELBO, nats per token", f"{nats:.4f}")
    table.add_row("ELBO, bits per token", f"{nats / np.log(2):.4f}")
    table.add_row("standard error, nats per token", errors)
    table.add_row("perplexity, at most", f"{np.exp(-nats):.4f}")
    table.caption = f"{pairs} complementary pair(s) of views a document, {seconds:.1f} s"
    return table


def _results(bounds: Bounds) -> list[Result]:
    nats, error, count = bounds.per_token, bounds.error_of_documents, len(bounds.tokens_D)
    interval = () if np.isnan(error) else (float(nats - 1.96 * error), float(nats + 1.96 * error))
    return [
        Result("elbo_nats_per_token", float(nats), "", *interval, records=count),
        Result("perplexity_at_most", float(np.exp(-nats)), records=count),
    ]


def _number(value: float) -> str:
    return "unknown" if np.isnan(value) else f"{value:.4f}"
