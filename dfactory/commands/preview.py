"""One document and one of its views as a person reads them: what is prompt, what is trained, what noise took away.

Each kind has a colour and a mark of its own, so that a log file without colours says the same:

    <role>HUMAN</role>hi<|role_end|><role>ASSISTANT</role>⟦yo<|role_end|><|endoftext|>⟧⟨fill 3⟩
    █⟪x⟫<|role_end|>█⟨fill 3⟩
"""

import functools
import itertools
from collections.abc import Callable, Iterator

import numpy as np
from rich.text import Text

from dfactory.types import AlignedDocument, Example, View
from dfactory.vocabulary import Vocabulary

SHOWN_TOKENS = 400  # of a long document
SHOWN_BEFORE = 160  # prompt tokens before the first trained one, if the document is long
PROMPT, TRAINED, FILL, MASKED, REPLACED = "prompt", "trained", "fill", "masked", "replaced"
STYLES = {PROMPT: "cyan", TRAINED: "bold green", FILL: "yellow", MASKED: "bold magenta", REPLACED: "bold red"}
BLOCK_CHARACTER = "█"

Decode = Callable[[np.ndarray], str]


def decoder_of(vocabulary: Vocabulary) -> Decode:
    """ids -> text, special tokens included; the ids themselves where there is no tokenizer."""
    if vocabulary.tokenizer is None:
        return lambda ids: "".join(f"{index} " for index in ids)
    whole = functools.partial(
        vocabulary.tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return lambda ids: vocabulary.ranges.written(ids.tolist(), whole)


def legend() -> Text:
    marks = {PROMPT: "prompt", TRAINED: "⟦trained⟧", FILL: "⟨EOS fill⟩", MASKED: "█ masked", REPLACED: "⟪replaced⟫"}
    return Text("  ").join(Text(mark, STYLES[kind]) for kind, mark in marks.items())


def document_text(example: Example, input_ids_T: np.ndarray, trainable_T: np.ndarray, decode: Decode) -> Text:
    """An aligned document. A long one is shown around its first trained token."""
    length = len(input_ids_T)
    start = max(0, int(trainable_T.argmax()) - SHOWN_BEFORE) if length > SHOWN_TOKENS else 0
    stop = min(length, start + SHOWN_TOKENS)
    text = Text(f"... {start} tokens ... " if start else "")
    for kind, first, last in _runs(start, stop, trainable_T, len(example)):
        text.append_text(_piece(kind, decode(input_ids_T[first:last]), last - first))
    return text.append(f" ... {length - stop} tokens" if stop < length else "")


def view_text(view: View, document: AlignedDocument, filled_from: int, mask_id: int, decode: Decode) -> Text:
    """What the model is given to predict the targets from, beside the clean blocks before: a character a mask."""
    position, text = view.position_P[:SHOWN_TOKENS], Text()

    def kind_at(index: int) -> str:
        p, token = position[index], view.input_ids_P[index]
        if token == mask_id:
            return MASKED
        if token != document.view_ids_T[p]:
            return REPLACED
        filled = p >= filled_from or token != document.input_ids_T[p]  # what follows an answer in its block
        return FILL if filled else TRAINED if document.trainable_T[p] else PROMPT

    for kind, run in itertools.groupby(range(len(position)), key=kind_at):
        index = list(run)
        text.append_text(_piece(kind, decode(view.input_ids_P[index]), len(index), marked=False))
    return text.append(" ..." if len(view.position_P) > SHOWN_TOKENS else "")


def _runs(start: int, stop: int, trainable_T: np.ndarray, filled_from: int) -> Iterator[tuple[str, int, int]]:
    """(kind, first, last + 1) of stretches of one kind."""

    def kind(position: int) -> str:
        return FILL if position >= filled_from else TRAINED if trainable_T[position] else PROMPT

    for name, run in itertools.groupby(range(start, stop), key=kind):
        positions = list(run)
        yield name, positions[0], positions[-1] + 1


def _piece(kind: str, decoded: str, count: int, marked: bool = True) -> Text:
    if kind == MASKED:
        decoded = BLOCK_CHARACTER * count
    elif kind == FILL:
        decoded = f"⟨fill {count}⟩"
    elif kind == REPLACED:
        decoded = f"⟪{decoded}⟫"
    elif kind == TRAINED and marked:
        decoded = f"⟦{decoded}⟧"
    return Text(decoded, STYLES[kind])
