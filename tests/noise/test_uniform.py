"""Uniform noise: canvases, what is replaced by what, and that it is a function of (seed, document, visit, view) alone."""

import numpy as np
import pytest

from dfactory.noise import GridUniform, UniformNoise
from dfactory.packing import PackedDocument, align_canvases, collate
from dfactory.types import Example

EOS, VOCABULARY = 0, 50


def example(trainable: str, document_id=3) -> Example:
    """Tokens 1, 2, 3, ...; `x` marks those of responses."""
    trainable_T = np.array([mark == "x" for mark in trainable])
    return Example(document_id, np.arange(1, len(trainable) + 1, dtype=np.int32), trainable_T)


def maker(**options) -> UniformNoise:
    return UniformNoise(**({"vocab_size": VOCABULARY, "seed": 7, "low": 0.1, "high": 0.9} | options))


def test_canvases_are_counted_from_the_response():
    document = align_canvases(example("..xxxxx"), 4, EOS)
    assert document.input_ids_T.tolist() == [1, 2, 3, 4, 5, 6, 7, 0, 0, 0]
    assert document.canvas_T.tolist() == [-1, -1, 2, 2, 2, 2, 6, 6, 6, 6]
    assert document.trainable_T.tolist() == [False] * 2 + [True] * 8
    assert document.real_T.tolist() == [False] * 2 + [True] * 5 + [False] * 3


def test_a_canvas_of_an_earlier_turn_ends_in_eos_before_the_next_response():
    """The first one has room for its EOS, the second ends where the last response begins. The clean stream keeps its
    text."""
    document = align_canvases(example(".x.....xx.x"), 4, EOS)
    assert document.canvas_T.tolist() == [-1, 1, 1, 1, 1, -1, -1, 7, 7, 7, 10, 10, 10, 10]
    assert document.view_ids_T.tolist() == [1, 2, 0, 0, 0, 6, 7, 8, 9, 0, 11, 0, 0, 0]
    assert document.input_ids_T.tolist() == [*range(1, 12), 0, 0, 0]
    assert np.flatnonzero(document.real_T).tolist() == [1, 7, 8, 10]


def test_every_position_of_a_view_is_a_target_and_the_share_replaced_is_t():
    document = align_canvases(example("." + "x" * 400), 100, EOS)
    (view,) = maker(low=0.0001, high=0.9999)(document, 0)
    assert view.position_P.tolist() == list(range(1, 401))
    assert view.target_P.all()
    assert (view.elbo_weight_P == 1).all()
    replaced_P = view.input_ids_P != document.view_ids_T[view.position_P]
    t_C = view.t_P.reshape(4, 100)
    assert (t_C == t_C[:, :1]).all()
    assert replaced_P.reshape(4, 100).mean(axis=1) == pytest.approx(t_C[:, 0], abs=0.15)


def test_replacements_are_uniform_over_the_whole_vocabulary():
    document = align_canvases(example("x" * 20_000), 20_000, EOS)
    (view,) = maker(low=1, high=1)(document, 0)
    counts = np.bincount(view.input_ids_P, minlength=VOCABULARY)
    assert counts.min() > 0.8 * 400
    assert counts.max() < 1.2 * 400


def test_noise_depends_on_seed_document_visit_and_view_alone():
    document = align_canvases(example("." + "x" * 40), 8, EOS)
    noise = maker(num_views=2, self_conditioning=0.5)
    first, again = noise(document, 1), noise(document, 1)
    assert all((a.input_ids_P == b.input_ids_P).all() for a, b in zip(first, again, strict=True))
    others = [first[1], noise(document, 2)[0], maker(seed=8)(document, 1)[0]]
    assert all((first[0].input_ids_P != other.input_ids_P).any() for other in others)
    # the noise of a view does not depend on whether some are conditioned
    assert (maker()(document, 1)[0].input_ids_P == first[0].input_ids_P).all()


def test_a_share_of_the_views_is_conditioned_as_a_whole():
    kept = []
    for number in range(300):
        document = align_canvases(example(".xxxxx", document_id=number), 4, EOS)
        flags_P = maker(self_conditioning=0.25)(document, 0)[0].columns_P["conditioned"]
        assert len(set(flags_P.tolist())) == 1
        kept.append(flags_P[0])
    assert np.mean(kept) == pytest.approx(0.25, abs=0.08)


def test_evaluation_views_are_the_same_on_every_visit():
    document = align_canvases(example("." + "x" * 40), 8, EOS)
    noise = GridUniform(VOCABULARY, 7, (0.2, 0.8))
    first, later = noise(document, 0), noise(document, 5)
    assert [float(view.t_P[0]) for view in first] == pytest.approx([0.2, 0.8])
    assert all((a.input_ids_P == b.input_ids_P).all() for a, b in zip(first, later, strict=True))


def test_clean_tokens_as_targets():
    """[clean 1..4 | canvas of positions 2 to 5]: each clean token is read from the one before it, and is no response
    token."""
    document = align_canvases(example("..xx"), 4, EOS)
    views = maker(self_conditioning=1.0)(document, 0)
    batch = collate([[PackedDocument(document, views, scores_context=True)]], 1)
    assert batch.input_ids_RS[0, :4].tolist() == [1, 2, 3, 4]
    assert batch.block_RS[0].tolist() == [0, 1, 2, 3, 2, 2, 2, 2]
    assert batch.target_index_N.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert batch.left_index_N.tolist()[:3] == [0, 1, 2]
    assert batch.target_ids_N.tolist() == [2, 3, 4, 3, 4, EOS, EOS]
    assert batch.view_N.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert batch.real_N.tolist() == [False] * 3 + [True, True, False, False]
    assert batch.columns["conditioned_N"].tolist() == [False] * 3 + [True] * 4


def test_without_them_the_clean_stream_ends_where_the_last_canvas_begins():
    document = align_canvases(example("..xxxxx"), 4, EOS)
    packed = PackedDocument(document, maker(num_views=2)(document, 0))
    assert packed.clean_length == 6
    assert packed.cost == 6 + 2 * 8
