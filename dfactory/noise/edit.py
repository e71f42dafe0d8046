"""Token editing: visible tokens as targets, and the model's own drafts as views (docs/method.md#token-editing).

Three kinds of targets stand in a view; the token that has to be predicted is the clean one for all of them:

    masked   [M]             what SFT has
    edited   a wrong token   token to token (T2T): a share of the visible response tokens is replaced
    kept     the clean one   a share of the others: what is right has to stay

With several turns (multi-turn forward, MTF) each view comes again with a share of its targets replaced by what the model
predicted for them: right drafts are then kept targets, wrong ones edited targets. Such a view is made in two steps.
`EditTargets` lays it out, and the noise that it needs, without a model; `replace_masked` and `next_turn` write the drafts
into the batch once a model has scored it.

    document     a  b  c  d  e  f  g  h      block size 8, all response
    turn 1       a [M] x  d  e [M] g  h      c is edited, h is kept; the model drafts b f and, for c, c
    turn 2       a  b  c  d  e [M] g  h      b and c were drafted; the targets are those of turn 1

LLaDA2.1 names the two ideas and no numbers: shares, and how a turn commits its draft, are options here.
"""

import dataclasses
from collections.abc import Callable, Collection

import numpy as np
import torch

from dfactory.noise.schedules import Purpose, generator
from dfactory.types import AlignedDocument, TokenScores, View, ViewBatch


def other_tokens(clean_P: np.ndarray, uniform_P: np.ndarray, text_ids: np.ndarray) -> np.ndarray:
    """A token of `text_ids` (ascending) for each position, uniform over those that are not the clean one."""
    rank_P = np.searchsorted(text_ids, clean_P)
    is_text_P = text_ids[np.minimum(rank_P, len(text_ids) - 1)] == clean_P
    drawn_P = (uniform_P * (len(text_ids) - is_text_P)).astype(np.int64)
    return text_ids[drawn_P + (is_text_P & (drawn_P >= rank_P))]


@dataclasses.dataclass(frozen=True, eq=False)
class EditTargets:
    """Adds edited and kept targets, and room for further turns, to the views of `masks`.

    Its masks are those of `masks` whatever the shares. The views of turn 1 come first, then those of turn 2, and so on.
    Where a model has to fill them in, they have a column `drafted`: in turn 1 the masked positions that `replace_masked`
    fills, later the targets that carry the draft unless a threshold decides.
    """

    masks: Callable[[AlignedDocument, int], list[View]]
    mask_id: int
    text_ids: np.ndarray  # what uniform replacements are drawn from, ascending
    seed: int
    edit_share: float
    keep_share: float = 1.0
    source: str = "uniform"
    num_turns: int = 1
    draft_share: float = 0.5

    def __call__(self, document: AlignedDocument, visit: int) -> list[View]:
        first = [self._edit(document, visit, n, view) for n, view in enumerate(self.masks(document, visit))]
        later = [
            self._draft(document, visit, turn * len(first) + n, view)
            for turn in range(1, self.num_turns)
            for n, view in enumerate(first)
        ]
        return first + later

    def _edit(self, document: AlignedDocument, visit: int, number: int, view: View) -> View:
        rng = generator(self.seed, document.document_id, visit, number, Purpose.EDIT)
        edit_P, keep_P, token_P = rng.random((len(view.position_P), 3)).T
        visible_P = document.trainable_T[view.position_P] & ~view.target_P
        edited_P = visible_P & (edit_P < self.edit_share)
        kept_P = visible_P & ~edited_P & (keep_P < self.keep_share)
        from_model = self.source == "model"
        wrong_P = other_tokens(document.view_ids_T[view.position_P], token_P, self.text_ids)
        return dataclasses.replace(
            view,
            input_ids_P=np.where(edited_P, np.int32(self.mask_id) if from_model else wrong_P, view.input_ids_P),
            target_P=view.target_P | edited_P | kept_P,
            columns_P={"drafted": edited_P & from_model} if from_model or self.num_turns > 1 else {},
        )

    def _draft(self, document: AlignedDocument, visit: int, number: int, view: View) -> View:
        rng = generator(self.seed, document.document_id, visit, number, Purpose.DRAFT)
        return dataclasses.replace(view, columns_P={"drafted": rng.random(len(view.position_P)) < self.draft_share})


@dataclasses.dataclass(frozen=True)
class Drafts:
    """Writes what a model predicts into the batches that `EditTargets` laid out.

    `views_per_turn` views of a document belong to a turn. A draft among `never_ids` (no decoder would emit it) is not
    written: the position stays as it is. The methods are pure functions of a batch and its scores, on one device.
    """

    views_per_turn: int
    never_ids: Collection[int]
    threshold: float | None = None

    def replace_masked(self, batch: ViewBatch, scores: TokenScores) -> ViewBatch:
        """Edited targets of turn 1 from the model: the prediction goes where the token was masked for it."""
        first_N = self._turn_N(batch) == 1
        return _with_inputs(batch, _drafted_N(batch) & first_N & self._decodable_N(scores), scores.argmax_N)

    def next_turn(self, batch: ViewBatch, scores: TokenScores, turn: int) -> ViewBatch:
        """Make the views of `turn` (2, 3, ...) out of the turn before, as the model scored it."""
        before = torch.nonzero(self._turn_N(batch) == turn - 1)[
            :, 0
        ]  # in the order of rows, documents, views, positions
        here = torch.nonzero(self._turn_N(batch) == turn)[:, 0]  # the same targets, one turn later
        drafted = _drafted_N(batch)[here]
        if self.threshold is not None:
            drafted = scores.argmax_logprob_N[before].exp() > self.threshold
        drafted = drafted & self._decodable_N(scores)[before]
        token_N = batch.input_N
        token_N[here] = torch.where(drafted, scores.argmax_N[before], token_N[before])
        return _with_inputs(batch, self._turn_N(batch) == turn, token_N)

    def _turn_N(self, batch: ViewBatch) -> torch.Tensor:
        return (batch.view_N - 1) // self.views_per_turn + 1

    def _decodable_N(self, scores: TokenScores) -> torch.Tensor:
        never = torch.tensor(sorted(self.never_ids), device=scores.argmax_N.device)
        return ~torch.isin(scores.argmax_N, never)


def _drafted_N(batch: ViewBatch) -> torch.Tensor:
    """The column; rows without documents have none."""
    nothing_N = torch.zeros(0, dtype=torch.bool, device=batch.target_index_N.device)
    return batch.columns["drafted_N"] if batch.num_targets else nothing_N


def _with_inputs(batch: ViewBatch, where_N: torch.Tensor, token_N: torch.Tensor) -> ViewBatch:
    """The batch with other tokens at some of its targets."""
    ids = batch.input_ids_RS.flatten().clone()
    ids[batch.target_index_N[where_N]] = token_N[where_N]
    return dataclasses.replace(batch, input_ids_RS=ids.view_as(batch.input_ids_RS))
