"""Views of canvases under uniform noise (docs/method.md#uniform-noise).

A view holds the canvases of a document's responses. Each of its tokens is replaced, with the chance t of its canvas, by a
token that is drawn uniformly from the whole vocabulary, special ones and the right one included. Nothing marks which tokens
were replaced, so all of them are targets, and none is weighed by 1/t.

With self-conditioning a share of the views gets the model's own prediction of a first pass (`conditioned`); the draw is
part of the noise, the pass is models/policy.py's.

    response   a b c d | e . EOS EOS      canvases of 4
    view       a x c d | e y EOS z        all eight are targets
"""

import dataclasses

import numpy as np

from dfactory.noise.schedules import Purpose, draw_t, generator
from dfactory.types import AlignedDocument, View


def corrupted_view(
    document: AlignedDocument, position_P: np.ndarray, replaced_P: np.ndarray, token_P: np.ndarray, t_P: np.ndarray
) -> View:
    """The view that has `token_P` in place of the tokens of `replaced_P`; all its positions are targets."""
    return View(
        position_P=position_P,
        input_ids_P=np.where(replaced_P, token_P, document.view_ids_T[position_P]).astype(np.int32),
        target_P=np.ones(len(position_P), bool),
        t_P=t_P.astype(np.float32),
        elbo_weight_P=np.ones(len(position_P), np.float32),
    )


@dataclasses.dataclass(frozen=True)
class UniformNoise:
    """Makes the training views of a document; see config/noise.py for the meaning of the options."""

    vocab_size: int
    seed: int
    low: float
    high: float
    per_block: bool = True
    num_views: int = 1
    stratified: bool = False
    self_conditioning: float = 0.0  # the share of views that get the first pass's prediction

    def __call__(self, document: AlignedDocument, visit: int) -> list[View]:
        return [self._view(document, visit, number) for number in range(self.num_views)]

    def _view(self, document: AlignedDocument, visit: int, number: int) -> View:
        position_P = np.flatnonzero(document.canvas_T >= 0).astype(np.int32)
        of_canvas_P = (
            np.unique(document.canvas_T[position_P], return_inverse=True)[1] if self.per_block else 0 * position_P
        )
        slices = {"slice_index": number, "num_slices": self.num_views} if self.stratified else {}
        key = (self.seed, document.document_id, visit, number)
        count = int(of_canvas_P.max(initial=-1)) + 1
        t_P = draw_t(generator(*key, Purpose.RATIO), count, self.low, self.high, **slices)[of_canvas_P]
        replaced_P = generator(*key, Purpose.MASK).random(len(position_P)) < t_P
        token_P = generator(*key, Purpose.TOKEN).integers(0, self.vocab_size, len(position_P))
        view = corrupted_view(document, position_P, replaced_P, token_P, t_P)
        if self.self_conditioning == 0:
            return view
        kept = generator(*key, Purpose.CONDITION).random() < self.self_conditioning
        return dataclasses.replace(view, columns_P={"conditioned": np.full(len(position_P), kept)})


@dataclasses.dataclass(frozen=True)
class GridUniform:
    """Makes the evaluation views of a document: one at each of a fixed list of shares of replaced tokens, the same on every
    visit, without self-conditioning."""

    vocab_size: int
    seed: int
    levels: tuple[float, ...]

    def __call__(self, document: AlignedDocument, visit: int) -> list[View]:
        position_P, views = np.flatnonzero(document.canvas_T >= 0).astype(np.int32), []
        for number, level in enumerate(self.levels):
            key = (self.seed, document.document_id, 0, number)
            replaced_P = generator(*key, Purpose.MASK).random(len(position_P)) < level
            token_P = generator(*key, Purpose.TOKEN).integers(0, self.vocab_size, len(position_P))
            views.append(corrupted_view(document, position_P, replaced_P, token_P, np.full(len(position_P), level)))
        return views
