"""Edited and kept targets, and drafts: by hand on eight tokens, rates, and what stays as it was."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from dfactory.algorithms.sft import metrics_by_kind
from dfactory.noise import Drafts, EditTargets, RandomMask
from dfactory.noise.edit import other_tokens
from dfactory.packing import PackedDocument, collate
from dfactory.types import AlignedDocument, TokenScores, View

MASK, EOS = 99, 98
TEXT = np.arange(90, dtype=np.int32)  # 90 to 99 are special
A, B, C, D, E, F, G, H, X = range(9)


def document(ids, trainable=None, document_id=3, block_size=8) -> AlignedDocument:
    ids = np.array(ids, np.int32)
    trainable = np.ones(len(ids), bool) if trainable is None else np.array(trainable, bool)
    return AlignedDocument(document_id, ids, trainable, block_size)


def masks(**options) -> RandomMask:
    return RandomMask(**({"mask_id": MASK, "seed": 7, "low": 0.2, "high": 0.6} | options))


def edits(share=0.3, **options) -> EditTargets:
    masks_of = options.pop("masks", masks())
    return EditTargets(masks_of, MASK, TEXT, seed=7, edit_share=share, **options)


LONG = document(np.arange(4096) % 95, np.arange(4096) >= 100)  # text, special tokens and 100 prompt tokens


# --- token to token ---------------------------------------------------------------------------------------------------


def test_shares_of_the_visible_response_tokens():
    plain, view = masks()(LONG, 0)[0], edits(0.3, keep_share=0.5)(LONG, 0)[0]
    clean = LONG.input_ids_T[view.position_P]
    visible = LONG.trainable_T[view.position_P] & ~plain.target_P
    edited, kept = view.target_P & (view.input_ids_P != clean) & visible, view.target_P & (view.input_ids_P == clean)
    assert np.array_equal(view.input_ids_P == MASK, plain.target_P)  # the masks are those of SFT
    assert (edited | kept | plain.target_P).tolist() == view.target_P.tolist()
    assert not (edited | kept)[~visible].any()  # prompt tokens never are targets
    count = visible.sum()
    assert abs(edited.mean() * len(edited) / count - 0.3) < 4 * np.sqrt(0.3 * 0.7 / count)
    left = count - edited.sum()
    assert abs(kept.sum() / left - 0.5) < 4 * np.sqrt(0.25 / left)
    assert np.array_equal(view.input_ids_P[~view.target_P], clean[~view.target_P])
    assert set(view.input_ids_P[edited]) <= set(TEXT.tolist())  # EOS and other special tokens are replaced, never put
    assert (clean[edited] >= 90).any()


def test_share_zero_changes_nothing_but_the_kept_targets():
    pair = masks(complementary=True)
    for plain, view in zip(pair(LONG, 1), edits(0, masks=pair)(LONG, 1), strict=True):
        assert np.array_equal(view.input_ids_P, plain.input_ids_P)
        assert np.array_equal(view.t_P, plain.t_P)
        assert view.target_P.tolist() == LONG.trainable_T[view.position_P].tolist()


def test_replacements_are_uniform_over_the_other_text_tokens():
    uniform = np.random.default_rng(0).random(90_000)
    counts = np.bincount(other_tokens(np.full(90_000, 41), uniform, TEXT), minlength=100)
    assert counts[41] == counts[90:].sum() == 0
    assert (np.abs(np.delete(counts[:90], 41) - 90_000 / 89) < 5 * np.sqrt(90_000 / 89)).all()
    ends = other_tokens(np.array([0, 0, 89, 89, EOS, 50]), np.array([0, 0.999, 0, 0.999, 0.999, 50 / 89]), TEXT)
    assert ends.tolist() == [1, 89, 0, 88, 89, 51]


def test_noise_is_a_function_of_seed_document_visit_and_view():
    def noise(make=None, doc=LONG, visit=0):
        return (make or edits())(doc, visit)[0].input_ids_P

    assert np.array_equal(noise(), noise())
    shorter = document(LONG.input_ids_T[:512], LONG.trainable_T[:512])
    assert np.array_equal(noise()[: len(noise(doc=shorter))], noise(doc=shorter))  # as far as both reach
    others = [edits(masks=masks(low=0, high=0.01)), dataclasses.replace(edits(), seed=8)]
    for other in [*map(noise, others), noise(visit=1), noise(doc=dataclasses.replace(LONG, document_id=4))]:
        assert not np.array_equal(noise(), other)


# --- drafts, by hand --------------------------------------------------------------------------------------------------

WORDS = document([A, B, C, D, E, F, G, H])
MASKED = np.array([0, 1, 0, 0, 0, 1, 0, 0], bool)
TARGET = np.array([0, 1, 1, 0, 0, 1, 0, 1], bool)  # b and f are masked, c is edited, h is kept
DRAFTED = np.array([0, 1, 1, 0, 0, 0, 0, 1], bool)  # of these all but f carry the draft in turn 2


def view(ids, drafted) -> View:
    ones = np.ones(8, np.float32)
    return View(np.arange(8, dtype=np.int32), np.array(ids, np.int32), TARGET, ones, ones, {"drafted": drafted})


def two_turns(first_ids, asked=(0,) * 8):
    views = [view(first_ids, np.array(asked, bool)), view(first_ids, DRAFTED)]
    return collate([[PackedDocument(WORDS, views)], []], 8)


def says(tokens, probabilities=None) -> TokenScores:
    """The model's drafts of b c f h in turn 1, then of the same in turn 2."""
    count = len(tokens)
    p = torch.tensor(probabilities or [0.5] * count)
    zeros = torch.zeros(count)
    return TokenScores(zeros, zeros, zeros.bool(), torch.tensor(tokens, dtype=torch.long), p.log())


def metrics_counts(batch) -> dict[str, int]:
    scores = says([X] * batch.num_targets)
    metrics = metrics_by_kind(batch, scores, MASK)
    return {kind: int(metrics[f"hit_rate_{kind}"].count) for kind in ("masked", "edited", "kept")}


def test_the_next_turn_by_hand():
    batch = two_turns([A, MASK, X, D, E, MASK, G, H])
    after = Drafts(views_per_turn=1, never_ids=(MASK,)).next_turn(batch, says([B, C, F, X, 0, 0, 0, 0]), turn=2)
    assert after.input_ids_RS[0, :8].tolist() == [A, MASK, X, D, E, MASK, G, H]
    assert after.input_ids_RS[0, 8:].tolist() == [A, B, C, D, E, MASK, G, X]  # a false edit is a draft as well
    assert torch.equal(after.input_ids_RS[1], batch.input_ids_RS[1])
    assert torch.equal(after.target_ids_N, batch.target_ids_N)
    assert after.target_ids_N.tolist() == [B, C, F, H] * 2
    assert metrics_counts(after) == {"masked": 3, "edited": 2, "kept": 3}


def test_a_threshold_commits_the_sure_drafts():
    drafts = Drafts(views_per_turn=1, never_ids=(MASK,), threshold=0.6)
    scores = says([B, C, X, X, 0, 0, 0, 0], [0.7, 0.5, 0.9, 0.6, 1, 1, 1, 1])
    after = drafts.next_turn(two_turns([A, MASK, X, D, E, MASK, G, H]), scores, turn=2)
    assert after.input_ids_RS[0, 8:].tolist() == [A, B, X, D, E, X, G, H]


def test_the_model_replaces_what_was_masked_for_it():
    batch = two_turns([A, MASK, MASK, D, E, MASK, G, H], asked=[0, 0, 1, 0, 0, 0, 0, 0])
    drafts = Drafts(views_per_turn=1, never_ids=(MASK, 97))
    after = drafts.replace_masked(batch, says([X, X, X, X, X, X, X, X]))
    assert after.input_ids_RS[0, :8].tolist() == [A, MASK, X, D, E, MASK, G, H]
    assert torch.equal(after.input_ids_RS[0, 8:], batch.input_ids_RS[0, 8:])  # turn 2 comes from next_turn
    never = drafts.replace_masked(batch, says([97] * 8))
    assert torch.equal(never.input_ids_RS, batch.input_ids_RS)


def test_drafts_that_no_decoder_would_emit_are_not_written():
    drafts = Drafts(views_per_turn=1, never_ids=(MASK, 97), threshold=0.0)
    after = drafts.next_turn(two_turns([A, MASK, X, D, E, MASK, G, H]), says([MASK, 97, EOS, H, 0, 0, 0, 0]), turn=2)
    assert after.input_ids_RS[0, 8:].tolist() == [A, MASK, X, D, E, EOS, G, H]


def test_rows_without_documents_have_nothing_to_draft():
    batch = collate([[], []], 8, pad_to=16)
    drafts = Drafts(views_per_turn=2, never_ids=(MASK,))
    assert torch.equal(drafts.replace_masked(batch, says([])).input_ids_RS, batch.input_ids_RS)
    assert torch.equal(drafts.next_turn(batch, says([]), turn=2).input_ids_RS, batch.input_ids_RS)


@pytest.mark.parametrize("source", ["uniform", "model"])
def test_turns_of_a_pair(source):
    """Views of all turns stand in one row; every turn has the targets of the first, for view and twin."""
    make = edits(0.3, masks=masks(complementary=True), source=source, num_turns=3, draft_share=0.4, keep_share=0.5)
    short = document(np.arange(64) % 90, np.arange(64) >= 20)
    views = make(short, 0)
    assert len(views) == 6
    for turn in (1, 2):
        for number in (0, 1):
            assert np.array_equal(views[2 * turn + number].target_P, views[number].target_P)
    drafted = np.concatenate([v.columns_P["drafted"] for v in make(LONG, 0)[2:]])
    assert abs(drafted.mean() - 0.4) < 4 * np.sqrt(0.24 / len(drafted))
    assert not np.array_equal(*np.split(drafted, 2))

    batch = collate([[PackedDocument(short, views)]], 8)
    asked = batch.columns["drafted_N"] & (batch.view_N <= 2)
    assert asked.any() == (source == "model")
    drafts = Drafts(views_per_turn=2, never_ids=(MASK,))
    scores = says([X] * batch.num_targets)
    filled = drafts.replace_masked(batch, scores)
    for turn in (2, 3):
        filled = drafts.next_turn(filled, scores, turn)
    inputs = [filled.input_N[(filled.view_N - 1) // 2 == turn] for turn in range(3)]
    assert len(inputs[0]) == len(inputs[1]) == len(inputs[2])
    for before, after in itertools.pairwise(inputs):
        changed = before != after
        assert changed.any()
        assert (after[changed] == X).all()
    masks_left = [int((turn == MASK).sum()) for turn in inputs]
    assert masks_left[0] > masks_left[1] > masks_left[2] > 0
