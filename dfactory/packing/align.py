"""Examples -> aligned documents: filled with EOS to whole blocks (docs/method.md#documents-and-blocks)."""

import dataclasses

import numpy as np

from dfactory.types import WHOLE, AlignedDocument, Example


def block_of(length, block_size: int, unit: int):
    """The block size for documents of `length` tokens (a number or an array): `block_size`, or for a shorter document its
    length, rounded up to a multiple of `unit`, whichever is smaller. A `unit` of WHOLE rounds nothing up."""
    unit = 1 if unit == WHOLE else min(unit, block_size)
    return np.minimum(block_size, -(-length // unit) * unit)


def whole_blocks(length: int, block_size: int) -> int:
    """`length` rounded down to whole blocks."""
    return length if block_size == WHOLE else length // block_size * block_size


def align(
    example: Example, block_size: int, eos_id: int, unit: int | None = None, after_answer: str = "fill"
) -> AlignedDocument:
    """The document, filled with EOS to the next multiple of `block_size`. With `unit`, a document shorter than a block
    becomes one block, filled to the next multiple of `unit` only. WHOLE documents, of full attention, are shorter than
    their block: without `unit` they are not filled.

    The fill is trainable where the last token is: a decoder has to produce it. Block size 4, EOS = 0:

        ids        5 6 7 8 0  ->  5 6 7 8 0 0 0 0
        trainable  0 0 1 1 1  ->  0 0 1 1 1 1 1 1
        real       0 0 1 1 1  ->  0 0 1 1 1 0 0 0

    `after_answer: fill` does the same inside a record of several turns: in views, an answer is followed in its block by EOS
    that has to be produced. With `text` views show the record's next turn there, which no decoder sees. In WHOLE
    documents nothing is shown in place of a turn: with full attention a view is the document.
    """
    size = int(block_of(len(example), block_size, unit or block_size))
    fill = -len(example) % size
    input_ids_T = np.concatenate([example.input_ids_T, np.full(fill, eos_id, np.int32)])
    trainable_T = np.concatenate([example.trainable_T, np.full(fill, fill and example.trainable_T[-1], bool)])
    eos_T = trainable_T & (input_ids_T == eos_id)  # in the prompt EOS ends earlier turns
    # a trace ends at a block's end and needs no fill; the tokens that its decoder wrote after EOS are its fill
    real_length = _after_first(eos_T) if example.commit_step_T is not None else _before_repeats(eos_T)
    document = AlignedDocument(example.document_id, input_ids_T, trainable_T, size, example.commit_step_T, real_length)
    filled_T = _after_answer(trainable_T, size)
    if block_size == WHOLE or after_answer == "text" or not filled_T.any():
        return document
    return dataclasses.replace(
        document,
        trainable_T=trainable_T | filled_T,
        shown_ids_T=np.where(filled_T, np.int32(eos_id), input_ids_T),
        filled_T=filled_T,
    )


def align_canvases(example: Example, canvas: int, eos_id: int) -> AlignedDocument:
    """The document of a model with causal context: blocks of one token, and canvases of `canvas` tokens over the responses.

    Canvases are counted from the start of each response and filled up with EOS that has to be produced. In a record of
    several turns that fill ends where the next response begins. Canvases of 4, EOS = 0:

        ids        5 6 7 8 9 1 0  ->  5 6 7 8 9 1 0 0 0 0
        trainable  0 0 1 1 1 1 1  ->  0 0 1 1 1 1 1 1 1 1
        canvas                        . . 2 2 2 2 6 6 6 6
    """
    canvas_T = canvases(example.trainable_T, canvas)
    length, trainable_T = len(example), canvas_T >= 0
    input_ids_T = np.concatenate([example.input_ids_T, np.full(len(canvas_T) - length, eos_id, np.int32)])
    filled_T = trainable_T.copy()
    filled_T[:length] &= ~example.trainable_T
    filled_T[length:] = False  # the fill after the document is told by its real length
    return AlignedDocument(
        example.document_id,
        input_ids_T,
        trainable_T,
        block_size=1,
        real_length=length,
        shown_ids_T=np.where(filled_T, np.int32(eos_id), input_ids_T),
        filled_T=filled_T,
        canvas_T=canvas_T,
    )


def canvases(trainable_T: np.ndarray, canvas: int) -> np.ndarray:
    """int32: the first position of the canvas that each position lies in, -1 in none; as long as the document with the fill
    of its last canvas."""
    edges = np.diff(trainable_T.astype(np.int8), prepend=0, append=0)
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    stops = starts + -(-(ends - starts) // canvas) * canvas
    stops[:-1] = np.minimum(stops[:-1], starts[1:])
    canvas_T = np.full(max(len(trainable_T), stops.max(initial=0)), -1, np.int32)
    for start, stop in zip(starts, stops, strict=True):
        canvas_T[start:stop] = start + np.arange(stop - start) // canvas * canvas
    return canvas_T


def _after_answer(trainable_T: np.ndarray, block_size: int) -> np.ndarray:
    """bool: the tokens after the last response token of each block that has one. Tokens between two answers in one block are
    kept, because the second answer needs its question."""
    trainable_BS = trainable_T.reshape(-1, block_size)
    later_BS = np.cumsum(trainable_BS[:, ::-1], axis=1)[:, ::-1]  # response tokens from here to the end of the block
    return ((later_BS == 0) & trainable_BS.any(axis=1, keepdims=True)).ravel()


def _after_first(eos_T: np.ndarray) -> int:
    """The length up to and including the first EOS; the whole length if there is none."""
    return int(eos_T.argmax()) + 1 if eos_T.any() else len(eos_T)


def _before_repeats(eos_T: np.ndarray) -> int:
    """The length without repeated EOS at the end, whether from `align` or from the record. An EOS before that ends an
    earlier turn of a conversation."""
    before = int(eos_T[::-1].argmin()) if not eos_T.all() else len(eos_T)  # EOS at the end
    return len(eos_T) - max(before - 1, 0)
