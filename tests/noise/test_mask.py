"""Views: what is masked, how often, and that the noise is a function of (seed, document, visit, view) alone."""

import numpy as np

from dfactory.noise import GridMask, RandomMask, masked_view, view_positions
from dfactory.noise.schedules import Purpose, draw_t, generator, linear_elbo_weight
from dfactory.types import AlignedDocument

MASK = 99
IDS = np.arange(8, dtype=np.int32)
#                     block 0             block 1              block size 4; the prompt ends at position 2
TRAINABLE = np.array([0, 0, 1, 1, 1, 1, 1, 1], dtype=bool)


def document(ids=IDS, trainable=TRAINABLE, document_id=3, block_size=4) -> AlignedDocument:
    return AlignedDocument(document_id, ids, trainable, block_size)


def maker(**options) -> RandomMask:
    defaults = {"mask_id": MASK, "seed": 7, "low": 0.3, "high": 0.8}
    return RandomMask(**(defaults | options))


def test_a_view_by_hand():
    position = np.array([4, 5, 6, 7], dtype=np.int32)
    masked = np.array([1, 0, 0, 1], dtype=bool)
    view = masked_view(document(), position, masked, np.full(4, 0.5), MASK)
    assert view.input_ids_P.tolist() == [99, 5, 6, 99]
    assert view.target_P.tolist() == [True, False, False, True]
    assert view.elbo_weight_P.tolist() == [2.0, 2.0, 2.0, 2.0]


def test_only_blocks_with_response_tokens_get_a_view():
    assert view_positions(document(trainable=np.array([0, 0, 0, 0, 0, 1, 0, 0], dtype=bool))).tolist() == [4, 5, 6, 7]
    assert view_positions(document(trainable=TRAINABLE)).tolist() == list(range(8))
    assert view_positions(document(trainable=np.zeros(8, dtype=bool))).tolist() == []


def test_prompt_tokens_of_the_first_response_block_are_never_masked():
    for visit in range(50):
        for view in maker(low=0.99, high=1.0, complementary=True)(document(), visit):
            assert view.input_ids_P[:2].tolist() == [0, 1]
            assert not view.target_P[:2].any()


def test_a_pair_masks_every_response_token_exactly_once():
    for visit in range(20):
        one, twin = maker(complementary=True)(document(), visit)
        assert (one.target_P ^ twin.target_P).tolist() == TRAINABLE.tolist()
        np.testing.assert_allclose(one.t_P + twin.t_P, 1.0, rtol=1e-6)
        for view in (one, twin):
            assert np.array_equal(view.input_ids_P == MASK, view.target_P)
            np.testing.assert_allclose(view.elbo_weight_P, 1 / view.t_P, rtol=1e-6)


def test_two_answers_to_one_prompt_get_the_same_masks_as_far_as_both_reach():
    """The same document id, more blocks: the noise of the common ones stays."""
    longer = document(np.arange(16, dtype=np.int32), np.arange(16) >= 2)
    for visit in range(20):
        one, other = maker()(document(), visit)[0], maker()(longer, visit)[0]
        assert np.array_equal(one.target_P, other.target_P[:8])
        assert np.array_equal(one.t_P, other.t_P[:8])


def test_noise_is_a_function_of_seed_document_visit_and_view():
    ids, trainable = np.arange(64, dtype=np.int32), np.ones(64, dtype=bool)

    def masks(seed=7, document_id=3, visit=0, view=0):
        return maker(seed=seed, num_views=2)(document(ids, trainable, document_id), visit)[view].target_P

    np.random.seed(0)
    before = masks()
    np.random.seed(1)
    maker()(document(ids, trainable, 5), 5)  # whatever ran before
    assert np.array_equal(before, masks())
    for other in (masks(seed=8), masks(document_id=4), masks(visit=1), masks(view=1)):
        assert not np.array_equal(before, other)


def test_the_masked_share_follows_t():
    """Within four standard errors, over 2,000 documents of 64 response tokens, for both levels of t."""
    ids, trainable = np.arange(64, dtype=np.int32), np.ones(64, dtype=bool)
    for per_block in (True, False):
        make = maker(per_block=per_block)
        views = [make(document(ids, trainable, number), 0)[0] for number in range(2000)]
        share = np.mean([view.target_P.mean() for view in views])
        assert abs(share - 0.55) < 4 * 0.15 / np.sqrt(2000)
        t = np.stack([view.t_P for view in views])
        assert 0.3 <= t.min() < 0.31
        assert 0.79 < t.max() <= 0.8
        assert (np.ptp(t, axis=1) > 0).mean() == (1.0 if per_block else 0.0)
        assert np.ptp(t.reshape(2000, 16, 4), axis=2).max() == 0  # one t a block
        # at a given t the rate is t: the correlation of residuals with t vanishes
        residual = np.stack([view.target_P for view in views]) - t
        assert abs((residual * t).mean()) < 4 * 0.5 * 0.6 / np.sqrt(2000 * 64)


def test_elbo_weights_integrate_to_one():
    """E_t[ 1{masked} / t ] = 1 for every token: the estimator counts each response token once."""
    ids, trainable = np.arange(64, dtype=np.int32), np.ones(64, dtype=bool)
    make = maker(low=0.1, high=0.9, complementary=True)
    pairs = [make(document(ids, trainable, number), 0) for number in range(2000)]
    for number in (0, 1):
        weights = np.stack([pair[number].elbo_weight_P * pair[number].target_P for pair in pairs])
        assert abs(weights.mean() - 1) < 4 * 1.25 / np.sqrt(2000 * 16)


def test_stratified_views_have_one_t_in_each_slice():
    for number in range(30):
        views = maker(num_views=5, stratified=True, per_block=False)(document(document_id=number), 0)
        slices = [int((view.t_P[0] - 0.3) / 0.1) for view in views]
        assert slices == [0, 1, 2, 3, 4]


def test_exact_counts_are_uniform_and_weigh_what_they_promise():
    """Block 0 has 2 response tokens, block 1 has 4: every count as often, weight (n + 1) / l, the twin the others."""
    counts = np.zeros((2, 5))
    for number in range(600):
        for view in maker(mask_count="exact", complementary=True)(document(document_id=number), 0):
            assert not view.target_P[:2].any()
            for block, (n, part) in enumerate(((2, slice(0, 4)), (4, slice(4, 8)))):
                masks = int(view.target_P[part].sum())
                counts[block, masks] += 1
                weights = view.elbo_weight_P[part][view.target_P[part]]
                np.testing.assert_allclose(weights, np.full(masks, (n + 1) / max(masks, 1)), rtol=1e-6)
    for n, observed in ((2, counts[0, :3]), (4, counts[1])):
        expected = 1200 / (n + 1)
        assert (abs(observed - expected) < 4 * np.sqrt(expected)).all()
    one, twin = maker(mask_count="exact", complementary=True, per_block=False)(document(), 0)
    assert (one.target_P ^ twin.target_P).tolist() == TRAINABLE.tolist()


def test_the_evaluation_grid_is_the_same_on_every_visit():
    grid = GridMask(MASK, 7, (0.25, 1.0))
    first, second = grid(document(), 0), grid(document(), 9)
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one.input_ids_P, other.input_ids_P)
    assert [view.t_P[0] for view in first] == [0.25, 1.0]
    assert first[1].target_P.tolist() == TRAINABLE.tolist()


def test_schedule():
    assert linear_elbo_weight(np.array([0.5, 0.25, 0.0])).tolist() == [2.0, 4.0, 0.0]
    t = draw_t(generator(1, 2, 3, 4, Purpose.RATIO), 1000, 0.2, 0.6, slice_index=1, num_slices=4)
    assert 0.3 <= t.min() <= t.max() <= 0.4
