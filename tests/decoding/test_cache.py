"""Cached, span by span, ragged: the same logits as one pass over the whole document."""

import numpy as np
import pytest
import torch

from dfactory.decoding.cache import BlockCache, BlockwiseAttention, PaddedAttention, Span, span_places
from dfactory.types import PADDING
from dfactory.visibility import visible
from tests.decoding.uncached import block_causal_logits

B = 4


def run(policy, cache, spans, ids_of_slot, form=BlockwiseAttention):
    """Logits of every span: [blocks * B, V] each."""
    parts = [(span.slot, torch.arange(span.first * B, span.stop * B)) for span in spans]
    cache.expect(
        torch.cat([torch.full_like(position, slot) for slot, position in parts]), torch.cat([p for _, p in parts])
    )
    ids = torch.cat([ids_of_slot[slot][position] for slot, position in parts])
    plan = form.of(spans, B, policy.device)
    with torch.inference_mode():
        logits = policy.logits(policy.hidden(ids[None], torch.cat([p for _, p in parts])[None], plan, cache))[0]
    return logits.split([span.blocks * B for span in spans])


def test_places_of_ragged_spans():
    query, key = span_places([Span(0, 2, 4, True), Span(3, 0, 1, True), Span(1, 0, 3, False)])
    assert query.document.tolist() == [[0, 0, -1], [3, -1, -1], [1, 1, 1]]
    assert query.block.tolist() == [[2, 3, 4], [0, 1, 2], [0, 1, 2]]
    assert query.view[0, :2].tolist() == [0, 1]
    assert key.document.tolist() == [[0, 0, 0, 0], [3, -1, -1, -1], [1, 1, 1, -1]]
    assert key.view.tolist() == [[0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]


def test_what_a_block_sees_is_the_beginning_of_its_slot():
    spans = [Span(0, 2, 4, True), Span(1, 0, 3, False)]
    plan = BlockwiseAttention.of(spans, B, torch.device("cpu"))
    seen_by = [(part.slot, part.keys, part.mask.sum(dim=1).tolist()) for part in plan.parts]
    assert seen_by == [(0, 16, [12] * B + [16] * B), (1, 12, [4] * B + [8] * B + [12] * B)]
    query, key = (p.at((slice(0, 1),)) for p in span_places(spans))
    seen = visible(query.at((0, slice(0, 2), None)), key.at((0, None, slice(None))))
    assert np.array_equal(seen, [[1, 1, 1, 0], [1, 1, 1, 1]])
    assert PADDING not in query.document[0, :2]


def test_small_blocks_share_a_call_and_large_ones_have_their_own():
    def parts(blocks, size):
        plan = BlockwiseAttention.of([Span(0, 0, blocks, True)], size, torch.device("cpu"))
        return [(part.tokens.stop - part.tokens.start, part.keys, part.mask is None) for part in plan.parts]

    assert parts(1, 8) == [(8, 8, True)]
    assert parts(70, 1) == [(64, 64, False), (6, 70, False)]
    assert parts(5, 24) == [(48, 48, False), (48, 96, False), (24, 120, True)]
    assert parts(2, 100) == [(100, 100, True), (100, 200, True)]


@pytest.mark.parametrize("form", [BlockwiseAttention, PaddedAttention])
def test_cached_equals_one_pass(policy, form):
    """Two documents in a cache of three slots, at different paces, with masked passes between the clean ones."""
    torch.manual_seed(0)
    ids = {0: torch.randint(0, 150, (6 * B,)), 2: torch.randint(0, 150, (4 * B,))}
    expected = {slot: block_causal_logits(policy, document, B) for slot, document in ids.items()}
    noisy = {slot: document.clone() for slot, document in ids.items()}
    noisy[0][2 * B : 3 * B] = 159
    masked_block_2 = block_causal_logits(policy, noisy[0][: 3 * B], B)[2 * B :]

    cache = BlockCache(3, 6 * B)
    got = {0: [], 2: []}

    def close(actual, wanted):
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-5)

    a, b = run(policy, cache, [Span(2, 0, 1, False), Span(0, 0, 2, False)], ids, form)
    got[2].append(a), got[0].append(b)
    (masked,) = run(policy, cache, [Span(0, 2, 3, True)], noisy, form)
    close(masked, masked_block_2)
    a, b = run(policy, cache, [Span(0, 2, 4, True), Span(2, 1, 2, True)], ids, form)  # [clean 2 | denoised 3]
    got[0].append(a), got[2].append(b)
    a, b = run(policy, cache, [Span(2, 2, 4, False), Span(0, 4, 6, True)], ids, form)
    got[2].append(a), got[0].append(b)
    for slot, parts in got.items():
        close(torch.cat(parts), expected[slot])


def test_a_slot_forgets_its_last_document(policy):
    torch.manual_seed(1)
    cache = BlockCache(1, 4 * B)
    run(policy, cache, [Span(0, 0, 4, False)], {0: torch.randint(0, 150, (4 * B,))})
    ids = {0: torch.randint(0, 150, (2 * B,))}
    (logits,) = run(policy, cache, [Span(0, 0, 2, True)], ids)
    torch.testing.assert_close(logits, block_causal_logits(policy, ids[0], B), atol=1e-5, rtol=1e-5)


def test_prefix_copied_from_another_slot(policy):
    torch.manual_seed(2)
    cache = BlockCache(2, 3 * B)
    ids = {slot: torch.randint(0, 150, (3 * B,)) for slot in (0, 1)}
    ids[1][: 2 * B] = ids[0][: 2 * B]
    run(policy, cache, [Span(0, 0, 3, False)], ids)
    with torch.inference_mode():
        cache.copy_prefix(0, 1, 2 * B)
    (logits,) = run(policy, cache, [Span(1, 2, 3, True)], ids)
    torch.testing.assert_close(logits, block_causal_logits(policy, ids[1], B)[2 * B :], atol=1e-5, rtol=1e-5)
