"""Sections `data` and `example`: what is kept of the records, and one of them as training sees it."""

import dataclasses
import math
from collections.abc import Iterator

from dfactory.assembly import Inputs, make_source, read_inputs
from dfactory.commands import preview
from dfactory.commands.checking.page import Page
from dfactory.data.examples import DataReport, Examples
from dfactory.data.pairs import SIDES
from dfactory.errors import DataError
from dfactory.packing import align, align_canvases
from dfactory.recipe import Recipe

RATIOS_SHOWN = 8
LOOKED_AT = 50_000  # documents, the first ones, for what takes a pass over them


def tell_data(page: Page, recipe: Recipe) -> Inputs:
    """The records. After a bad row is reported, the rest is read without it, so that all bad rows are counted."""
    try:
        inputs = read_inputs(recipe)
    except DataError as problem:
        if recipe.on_bad_row == "skip" and recipe.max_bad_fraction == 1:
            raise
        lenient = dataclasses.replace(recipe, on_bad_row="skip", max_bad_fraction=1.0)
        try:
            inputs = read_inputs(lenient)
        except DataError:
            raise problem from None
        page.problem(problem)
    if inputs.train is not None:
        _tell_documents(page, "training", inputs.train.report)
        _warn_of_lengths(page, recipe, inputs.train.report)
        _warn_of_blocks(page, recipe, inputs.train.report)
        _warn_of_copies(page, inputs.train)
        _warn_of_endings(page, recipe, inputs)
    if inputs.held_out is None:
        page.warn("eval_datasets is empty: nothing will tell whether the model learns or memorises")
    else:
        _tell_documents(page, "held out", inputs.held_out.report)
        if inputs.train is not None:
            _warn_of_leak(page, inputs)
    return inputs


def _tell_documents(page: Page, name: str, report: DataReport) -> None:
    trainable, fill = report.trainable_tokens / report.tokens, report.aligned_tokens - report.tokens
    page.line(
        name,
        f"{report.kept:,} documents of {', '.join(report.files)}"
        + f", {report.further_parts:,} of them go on with a split text" * (report.further_parts > 0),
        f"{report.tokens:,} tokens, {trainable:.1%} trainable; {fill:,} more of EOS fill; longest {report.longest:,}, "
        f"mean {report.tokens / report.kept:,.0f}; {report.truncated / report.kept:.1%} cut at max_length",
    )
    if report.left_out:
        page.line("  left out", f"{report.left_out:,} traces whose response is not correct (trace_filter)")
    for fault, refused in sorted(report.refused.items(), key=lambda item: -item[1].count):
        page.line("  refused", f"{refused.count:,}: {fault}; first {refused.first[0]}")


def _warn_of_leak(page: Page, inputs: Inputs) -> None:
    held_out = set(_contents(inputs.held_out, len(inputs.held_out)))
    shared = len(held_out.intersection(_contents(inputs.train, len(inputs.train))))
    if shared:
        page.warn(
            f"{shared:,} held-out documents are also training documents: the held-out loss will flatter the model"
        )


def _contents(examples: Examples, count: int) -> Iterator[int]:
    return (hash(examples[index].input_ids_T.tobytes()) for index in range(min(count, len(examples))))


def _warn_of_copies(page: Page, examples: Examples) -> None:
    """Exact copies among the first documents; the sides of pairs may well be alike."""
    seen = min(LOOKED_AT, len(examples))
    copies = seen - len(set(_contents(examples, seen)))
    if examples.unit_size == 1 and copies > 0.1 * seen:
        page.warn(f"{copies:,} of the first {seen:,} documents are exact copies of others: see `dfactory data dedup`")


def _warn_of_endings(page: Page, recipe: Recipe, inputs: Inputs) -> None:
    """Tokenised records and texts may have no EOS; the fill after them teaches it, unless there is no fill."""
    if recipe.views_are_traces or recipe.overlong != "refuse":
        return
    seen = min(LOOKED_AT, len(inputs.train))
    open_ended = sum(int(inputs.train[index].input_ids_T[-1]) != inputs.special.eos for index in range(seen))
    if open_ended > 0.05 * seen:
        page.warn(
            f"{open_ended:,} of the first {seen:,} documents do not end with EOS ({inputs.special.eos}): where one fills "
            "its last block, the model is not taught to stop; add it to the records"
        )


def _warn_of_blocks(page: Page, recipe: Recipe, report: DataReport) -> None:
    """The block size against the lengths."""
    if recipe.block_size is None:  # whole documents: no fill, and no cache
        return
    fill = report.aligned_tokens - report.tokens
    if recipe.block_size_schedule is None and fill > 1.5 * report.trainable_tokens:
        page.warn(
            f"block_size {recipe.block_size} is long for these answers: {fill:,} tokens of EOS fill are trained beside "
            f"{report.trainable_tokens:,} of answers; a smaller one, if the model knows it, wastes less"
        )
    if recipe.block_size_schedule is None and recipe.block_size > report.longest:
        page.warn(
            f"block_size {recipe.block_size} is longer than the longest document ({report.longest}): nothing can be cached"
        )


def _warn_of_lengths(page: Page, recipe: Recipe, report: DataReport) -> None:
    unit = recipe.fill_unit
    need = math.ceil(report.longest / unit) * unit
    if recipe.max_length >= 2 * need:
        page.warn(
            f"max_length {recipe.max_length} is {recipe.max_length / need:.1f} times the longest document; "
            f"max_length={need} is enough"
        )
    if report.truncated > 0.05 * report.kept:
        page.warn(
            f"{report.truncated / report.kept:.0%} of the documents are cut, their ends are not learnt: raise max_length"
        )
    if report.trainable_tokens < 0.05 * report.tokens:
        page.warn(
            f"only {report.trainable_tokens / report.tokens:.1%} of the tokens are trained: is the rest really prompt?"
        )


def tell_example(page: Page, recipe: Recipe, inputs: Inputs) -> None:
    """The first document of a readable length, or both sides of its pair, with a first training view."""
    length_E, size = inputs.train.length_E, inputs.train.unit_size
    index = int((length_E <= preview.SHOWN_TOKENS).argmax()) // size * size  # the very first if all are longer
    page.line("legend", preview.legend())
    for name, member in zip(SIDES if size == 2 else ("document",), range(index, index + size), strict=True):
        _show_example(page, recipe, inputs, name, member)


def _show_example(page: Page, recipe: Recipe, inputs: Inputs, name: str, index: int) -> None:
    example = inputs.train[index]
    decode = preview.decoder_of(inputs.vocabulary)
    document = (
        align_canvases(example, recipe.block_size, inputs.special.eos)
        if recipe.has_canvases
        else align(example, recipe.aligned_block_size, inputs.special.eos, recipe.fill_unit, recipe.after_answer)
    )
    ids_T, trainable_T = document.input_ids_T, example.trainable_T
    views = make_source(recipe, inputs, rank=0, world_size=1).make_views(document, 0)
    page.line(name, preview.document_text(example, ids_T, trainable_T, decode))
    view_text = preview.view_text(views[0], document, len(example), inputs.special.mask, decode)
    page.line(f"view 1 of {len(views)}", view_text)
    block_t = ", ".join(
        f"{t:.2f}" for t in views[0].t_P[:: recipe.block_size or recipe.aligned_block_size][:RATIOS_SHOWN]
    )
    page.line("its mask ratio", f"t {block_t}, by block; {int(views[0].target_P.sum())} targets; from {example.origin}")
