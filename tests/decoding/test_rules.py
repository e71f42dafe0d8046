"""The decoding rules on cases of four tokens that a person can check."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from dfactory.decoding.counts import SCHEDULES, least_counts
from dfactory.decoding.decisions import Acceptance, DecodeRules, Editing
from dfactory.decoding.distribution import CHANCES, LIKELY, Distribution, _nucleus, _sorted_nucleus, uniform_numbers
from dfactory.decoding.keys import DecodeKeys, load_decode_keys
from dfactory.decoding.rules.base import CONFIDENCE, Forward, Proposal
from dfactory.decoding.rules.left_to_right import LeftToRight
from dfactory.decoding.rules.threshold import Threshold
from dfactory.errors import ConfigError


def proposal(token, p, top, top_p) -> Proposal:
    return Proposal(torch.tensor([token]), torch.tensor([p]).log(), torch.tensor([top]), torch.tensor([top_p]).log())


def confidence(acceptance, proposed, step=0, masked=None) -> list[float]:
    masked = yes(1, 1, 1, 1) if masked is None else masked
    return acceptance.confidence(proposed, masked, torch.tensor([step]))[0].tolist()


def commit(rule, confidence, masked, step=0) -> torch.Tensor:
    return rule.commit(forward_of(masked, [step], {CONFIDENCE: [confidence]}))


def forward_of(masked, step, columns, **others) -> Forward:
    """A forward of which a rule reads some columns and no proposal."""
    columns = {column.name: torch.tensor(values) for column, values in columns.items()}
    fields = {"proposal_RB": None, "tokens_RB": None, "editable_RB": ~masked, "memory": {}} | others
    return Forward(masked_RB=masked, step_R=torch.tensor(step), columns=columns, **fields)


def counts_of(masks, steps, schedule, block_size=None) -> list[int]:
    """What the steps of a block commit, one after the other, until no mask is left."""
    counts = []
    while masks:
        state = torch.tensor([masks]), torch.tensor([len(counts)])
        (count,) = least_counts(schedule, *state, steps, block_size or masks + sum(counts)).tolist()
        counts.append(min(count, masks))
        masks -= counts[-1]
    return counts


def yes(*flags) -> torch.Tensor:
    return torch.tensor([flags], dtype=torch.bool)


LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[None]


@pytest.mark.parametrize(
    "distribution, expected",
    [
        (Distribution(1.0), [0.5, 0.3, 0.15, 0.05]),
        (Distribution(1.0, suppressed_ids=(0,)), [0, 0.6, 0.3, 0.1]),
        (Distribution(0.5), [0.6849, 0.2466, 0.0616, 0.0068]),  # squares, normalised
        (Distribution(1.0, top_k=2), [0.625, 0.375, 0, 0]),
        (Distribution(1.0, top_k=9), [0.5, 0.3, 0.15, 0.05]),
        (Distribution(1.0, top_p=0.5), [1, 0, 0, 0]),
        (Distribution(1.0, top_p=0.6), [0.625, 0.375, 0, 0]),
        (Distribution(1.0, top_p=0.0), [1, 0, 0, 0]),
        (Distribution(1.0, top_p=1.0), [0.5, 0.3, 0.15, 0.05]),
        (Distribution(1.0, top_k=2, suppressed_ids=(0,)), [0, 2 / 3, 1 / 3, 0]),
    ],
)
def test_processed_distribution(distribution, expected):
    """A token comes out for as many of the evenly spread numbers as its probability says."""
    count = 20_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = distribution.propose(LOGITS.expand(count, -1), uniform)
    frequency = torch.bincount(drawn.token, minlength=4) / count
    torch.testing.assert_close(frequency, torch.tensor(expected, dtype=torch.float), atol=1e-4, rtol=0)
    torch.testing.assert_close(drawn.logprob.exp(), torch.tensor(expected)[drawn.token].float(), atol=1e-4, rtol=0)
    assert drawn.top_logprob.exp().allclose(torch.tensor(float(max(expected))), atol=1e-4)
    assert torch.equal(drawn.top_token, torch.full_like(drawn.top_token, expected.index(max(expected))))


@pytest.mark.parametrize("mass", [0.0, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # in which many logits are equal
def test_the_nucleus_of_a_large_vocabulary_is_that_of_all_its_tokens_sorted(mass, dtype):
    """Peaked rows, whose nucleus lies within the first tokens looked at, beside flat ones."""
    scale_N1 = torch.tensor([0.0, 0.3, 2.0, 4.0, 8.0])[:, None]
    logits_NV = (torch.randn(5, 4 * LIKELY, generator=torch.Generator().manual_seed(0)) * scale_N1).to(dtype).float()
    expected_NV = _sorted_nucleus(logits_NV, mass)
    assert torch.equal(_nucleus(logits_NV, mass), expected_NV)
    size_N = expected_NV.isfinite().sum(dim=-1)
    assert size_N[-1] < LIKELY
    assert mass < 0.5 or size_N[0] > LIKELY


def test_draw_at_the_edges_never_takes_an_impossible_token():
    distribution = Distribution(1.0, suppressed_ids=(0, 3))
    uniform = torch.tensor([0.0, 1 - 2**-48], dtype=torch.float64)
    assert distribution.propose(LOGITS.expand(2, -1), uniform).token.tolist() == [1, 2]


def test_tokens_that_end_a_response_cannot_come_out_early():
    early = torch.tensor([True, False])
    for temperature in (0.0, 1.0):
        distribution = Distribution(temperature, end_ids=(0, 2))
        numbers, _ = distribution.read(LOGITS.expand(2, -1), torch.zeros(2, dtype=torch.float64), early_N=early)
        assert numbers[0].tolist() == [1, 0]
        assert numbers[1].exp().tolist() == pytest.approx([0.3 / 0.35, 0.5])


def test_guidance_counts_what_the_prompt_adds_more_than_once():
    with_and_without = torch.tensor([[[1.0, 2.0], [0.5, 3.0]]])
    assert Distribution(cfg_scale=1.5).guided(with_and_without).tolist() == [[1.75, 0.5]]
    assert Distribution().guided(with_and_without).tolist() == [[1.0, 2.0]]


def test_greedy_is_the_argmax_of_what_is_not_suppressed_under_the_plain_softmax():
    drawn = Distribution(0.0, top_k=1, top_p=0.1, suppressed_ids=(0,)).propose(LOGITS)
    assert drawn.token.tolist() == [1]
    assert drawn.logprob.exp().item() == pytest.approx(0.6)
    assert drawn.top_logprob.exp().item() == pytest.approx(0.6)


def test_propose_leaves_the_logits_alone():
    logits = LOGITS.clone()
    Distribution(0.0, suppressed_ids=(0,)).propose(logits)
    assert torch.equal(logits, LOGITS)


def test_bf16_logits_are_normalised_in_float32():
    drawn = Distribution().propose(LOGITS.bfloat16())
    assert drawn.logprob.dtype == torch.float32
    assert drawn.logprob.item() == LOGITS.bfloat16().float().log_softmax(-1).max().item()


def test_threshold_commits_all_above_it():
    assert torch.equal(commit(Threshold(0.95), [0.97, 0.60, 0.99, 0.20], yes(1, 1, 1, 1)), yes(1, 0, 1, 0))


def test_threshold_falls_back_to_the_most_confident_masked_ones():
    confidence = [0.50, 0.60, 0.30, 0.99]
    assert torch.equal(commit(Threshold(0.95), confidence, yes(1, 1, 1, 0)), yes(0, 1, 0, 0))
    assert torch.equal(commit(Threshold(0.95, 2), confidence, yes(1, 1, 1, 0)), yes(1, 1, 0, 0))
    assert torch.equal(commit(Threshold(0.95, 2), confidence, yes(0, 0, 1, 0)), yes(0, 0, 1, 0))
    assert torch.equal(commit(Threshold(0.55, 2), confidence, yes(1, 1, 1, 0)), yes(1, 1, 0, 0))
    assert torch.equal(commit(Threshold(0.95), confidence, yes(0, 0, 0, 0)), yes(0, 0, 0, 0))


def test_threshold_is_exceeded_not_reached_and_ties_go_to_the_left():
    assert torch.equal(commit(Threshold(1.0), [1.0] * 4, yes(0, 1, 1, 1)), yes(0, 1, 0, 0))


def test_left_to_right_commits_the_first_masks():
    masked = torch.tensor([[True, False, True, True], [False, False, False, True]])
    committed = LeftToRight(2).commit(forward_of(masked, [0, 0], {}))
    assert committed.tolist() == [[True, False, True, False], [False, False, False, True]]
    assert [LeftToRight(n).most_steps(8) for n in (1, 2, 3)] == [8, 4, 3]


def test_rows_are_judged_one_by_one():
    confidence = [[0.97, 0.20], [0.30, 0.40]]
    forward = forward_of(torch.ones(2, 2, dtype=torch.bool), [0, 1], {CONFIDENCE: confidence})
    assert Threshold(0.95).commit(forward).tolist() == [[True, False], [False, True]]
    by_step = Threshold(1.0, steps=2, step_schedule="ascending").commit(forward)
    assert by_step.tolist() == [[True, False], [True, True]]  # a first step and a last one


def test_acceptance_looks_at_the_sample_or_at_the_top():
    rare_sample = proposal([1, 1, 1, 1], [0.01, 0.5, 0.5, 0.5], top=[2, 1, 3, 1], top_p=[0.99, 0.5, 0.6, 0.5])
    assert confidence(Acceptance("top"), rare_sample) == pytest.approx([0.99, 0.5, 0.6, 0.5])
    assert confidence(Acceptance("sampled"), rare_sample) == pytest.approx([0.01, 0.5, 0.5, 0.5])


def test_confidence_of_eos_rises_over_the_steps():
    """EOS is 7: drawn at positions 0 and 1, on top at 1 and 2."""
    both = proposal([7, 7, 1, 1], [0.2, 0.8, 0.1, 0.5], top=[1, 7, 7, 1], top_p=[0.4, 0.8, 0.9, 0.5])
    for step, factor in enumerate([0.4, 0.6, 0.8, 1.0]):
        sampled, top = (Acceptance(by, 0.6, 7, num_steps=4) for by in ("sampled", "top"))
        assert confidence(sampled, both, step) == pytest.approx([0.2 * factor, 0.8 * factor, 0.1, 0.5])
        assert confidence(top, both, step) == pytest.approx([0.4, 0.8 * factor, 0.9 * factor, 0.5])
    assert confidence(top, both, 0, yes(0, 0, 0, 0)) == pytest.approx([0.4, 0.8, 0.9, 0.5])  # nothing left to wait for
    assert confidence(Acceptance("top", 1.0, 7, num_steps=4), both) == pytest.approx([0.4, 0, 0, 0.5])
    assert confidence(Acceptance("top", 0.0, 7, num_steps=4), both) == pytest.approx([0.4, 0.8, 0.9, 0.5])


def test_a_deferred_token_comes_last_and_the_others_share_its_probability():
    """7 ends a response and has 0.5 at every position."""
    drawn = proposal([7, 1, 1, 1], [0.5, 0.4, 0.2, 0.5], top=[7, 1, 7, 1], top_p=[0.5, 0.4, 0.5, 0.5])
    half, step = torch.full((1, 4), 0.5), torch.tensor([0])
    sampled, top = (Acceptance(by, deferred_ids=(7,)) for by in ("sampled", "top"))
    assert sampled.confidence(drawn, half > 0, step, half)[0].tolist() == pytest.approx([0, 0.8, 0.4, 1.0])
    assert top.confidence(drawn, half > 0, step, half)[0].tolist() == pytest.approx([0, 0.8, 0, 1.0])
    (column,) = sampled.columns
    assert column.of(torch.tensor([[0.1, 0.2, 0.7]]).log().repeat(1, 4)[:, :8]).item() == pytest.approx(0.2)
    assert Acceptance().columns == ()


def test_rows_are_at_their_own_step():
    eos = torch.full((3, 2), 7)
    half = torch.full((3, 2), 0.5).log()
    masked = torch.tensor([[True, True], [False, True], [False, False]])
    judged = Acceptance("top", 0.8, 7, num_steps=3).confidence(
        Proposal(eos, half, eos, half), masked, torch.tensor([0, 1, 1])
    )
    torch.testing.assert_close(judged, torch.tensor([[0.1, 0.1], [0.3, 0.3], [0.5, 0.5]]))


def test_steps_of_a_block():
    assert Threshold(0.9, 1).most_steps(32) == 32
    assert Threshold(0.9, 3).most_steps(32) == 11
    assert Threshold(0.9, steps=6, step_schedule="ascending").most_steps(32) == 6


@pytest.mark.parametrize(
    "schedule, masks, steps, expected",
    [
        ("even", 32, 6, [6, 6, 5, 5, 5, 5]),
        ("even", 32, 32, [1] * 32),
        ("even", 10, 3, [4, 3, 3]),
        ("ascending", 32, 6, [1, 1, 2, 4, 8, 16]),
        ("ascending", 32, 5, [1, 2, 4, 8, 17]),
        ("ascending", 128, 7, [1, 2, 4, 8, 16, 32, 65]),  # as the authors' code
        ("ascending", 32, 3, [4, 9, 19]),
        ("ascending", 32, 8, [1, 1, 1, 1, 1, 3, 8, 16]),
        ("ascending", 7, 1, [7]),
        ("ascending", 2, 4, [1, 1]),  # a block that a prompt or a draft has all but filled
        ("rounded", 20, 9, [2, 2, 2, 2, 2, 2, 3, 2, 3]),
        ("rounded", 8, 5, [2, 2, 1, 2, 1]),  # two halves up
        ("rounded", 4, 3, [1, 1, 2]),  # one down
        ("rounded", 4, 5, [1, 1, 1, 1]),  # steps that would commit nothing are left out
        ("block", 10, 3, [4, 3, 3]),
    ],
)
def test_counts_of_the_steps(schedule, masks, steps, expected):
    assert counts_of(masks, steps, schedule) == expected


def test_counts_of_a_whole_block_hold_where_a_prompt_fills_part_of_it():
    assert counts_of(4, 3, "block", block_size=8) == [3, 1]
    assert counts_of(4, 3, "even", block_size=8) == [2, 1, 1]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_counts_add_up_and_never_fall_where_they_ascend(schedule):
    for masks, steps in [(m, s) for m in range(1, 41) for s in range(1, m + 1)] + [(4096, 4000), (4096, 13)]:
        counts = counts_of(masks, steps, schedule)
        assert (len(counts), sum(counts)) == (steps, masks)
        assert min(counts) >= 1
        if schedule == "ascending":
            assert counts == sorted(counts)
            assert all(2 * a <= b or a == 1 for a, b in itertools.pairwise(counts))
            assert counts[0] < counts[-1] or steps in (1, masks)
        else:
            assert max(counts) - min(counts) <= 1


def test_steps_bound_a_threshold_from_below():
    rule, masked = Threshold(0.8, steps=3, step_schedule="ascending"), yes(*[1] * 7)
    sure_of_none, sure_of_five = [0.1, 0.7, 0.3, 0.2, 0.6, 0.5, 0.4], [0.9] * 5 + [0.1, 0.2]
    assert torch.equal(commit(rule, sure_of_none, masked, 0), yes(0, 1, 0, 0, 0, 0, 0))
    assert torch.equal(commit(rule, sure_of_five, masked, 0), yes(1, 1, 1, 1, 1, 0, 0))
    assert torch.equal(commit(rule, sure_of_none, masked, 1), yes(0, 1, 0, 0, 1, 0, 0))
    assert torch.equal(commit(rule, sure_of_none, masked, 2), masked)


@pytest.mark.parametrize(
    "rule, message",
    [({"min_commit": 0}, "min_commit 0"), ({"step_schedule": "rising"}, "step_schedule rising: .* ascending")],
)
def test_rules_that_cannot_be(rule, message):
    with pytest.raises(ConfigError, match=message):
        Threshold(0.9, **rule)


def test_editing_replaces_other_tokens_that_are_sure():
    confidence, differs = torch.tensor([[0.9, 0.9, 0.4, 0.9]]), yes(0, 1, 1, 1)
    assert torch.equal(Editing(0.5).edit(confidence, differs, yes(1, 1, 1, 0)), yes(0, 1, 0, 0))
    assert torch.equal(Editing(0.0).edit(confidence, differs, yes(1, 1, 1, 0)), yes(0, 1, 1, 0))


def test_noise_depends_on_seed_prompt_and_step_only():
    noise = uniform_numbers(3, 7, 5, 4)
    assert np.array_equal(noise, uniform_numbers(3, 7, 5, 4))
    others = [uniform_numbers(4, 7, 5, 4), uniform_numbers(3, 8, 5, 4), uniform_numbers(3, 7, 6, 4)]
    others.append(uniform_numbers(3, 7, 5, 4, CHANCES))  # what rules leave to chance
    assert all(not np.intersect1d(noise, other).size for other in others)
    many = np.concatenate([uniform_numbers(0, prompt, 0, 100) for prompt in range(100)])
    assert 0 <= many.min() < many.max() < 1
    assert many.mean() == pytest.approx(0.5, abs=4 / math.sqrt(12 * len(many)))


def test_rules_of_keys():
    keys = DecodeKeys(block_size=8, editing_threshold=0.0, max_post_steps=3, acceptance="top", min_commit=2)
    rules = DecodeRules.of(keys, mask_token_id=9, eos_token_id=7, special_ids=[5, 7])
    assert rules.distribution.suppressed_ids == (5, 9)
    assert rules.editing == Editing(0.0, 3)
    assert rules.rule == Threshold(0.95, 2)
    assert rules.acceptance == Acceptance("top", 0.0, 7, 4)
    ends = DecodeRules.of(
        dataclasses.replace(keys, stop_token_ids=[5], defer_eos=True),
        mask_token_id=9,
        eos_token_id=7,
        special_ids=[5, 7],
    )
    assert (ends.distribution.suppressed_ids, ends.end_ids, ends.acceptance.deferred_ids) == ((9,), (7, 5), (7, 5))
    assert DecodeRules.of(DecodeKeys(block_size=8), mask_token_id=9, eos_token_id=7).editing is None


def test_rules_of_keys_of_steps():
    ids = {"mask_token_id": 9, "eos_token_id": 7}
    keys = DecodeKeys(block_size=8, steps=4, step_schedule="ascending", eos_penalty=0.5)
    rules = DecodeRules.of(keys, **ids)
    assert rules.rule == Threshold(0.95, 1, 4, "ascending")
    assert rules.acceptance == Acceptance("sampled", 0.5, 7, 4)
    assert DecodeRules.of(DecodeKeys(block_size=8, eos_penalty=0.5), **ids).acceptance.num_steps == 8


@pytest.mark.parametrize(
    "words, message",
    [
        ("step_schedule=ascending", "decode.step_schedule ascending without decode.steps"),
        ("steps=4 min_commit=2", "decode.min_commit 2 with decode.steps 4: both say"),
        ("step_schedule=rounded", "decode.step_schedule rounded without decode.steps"),
        ("steps=9", "decode.steps 9 > block_size 8"),
        ("steps=1 step_schedule=ascending", "ascending with decode.steps 1 and block_size 8: no step"),
        ("steps=8 step_schedule=ascending", "ascending with decode.steps 8 and block_size 8: no step"),
        ("steps=1 eos_penalty=0.5", "decode.eos_penalty 0.5 where a block of 8 takes one forward"),
        ("min_commit=8 eos_penalty=0.5", "decode.eos_penalty 0.5 where"),
        ("eos_penalty=1.5", "eos_penalty 1.5 in the command line: it must be at most 1"),
        ("step_schedule=ascend", "step_schedule ascend in .* did you mean ascending"),
        ("steps=0", "steps 0 in .* at least 1"),
    ],
)
def test_keys_of_steps_that_make_no_sense(words, message):
    with pytest.raises(ConfigError, match=message):
        load_decode_keys(["decode.block_size=8", *words.split()])


def test_rules_repeat_what_keys_could_not_know():
    """`generate` without a block size: the model tells it after the keys are read."""
    keys = load_decode_keys(["decode.steps=9"])
    keys.block_size = 8
    with pytest.raises(ConfigError, match=r"decode\.steps 9 > block_size 8"):
        DecodeRules.of(keys, mask_token_id=9, eos_token_id=7)


def test_keys_come_before_the_tokenizer():
    keys = DecodeKeys(block_size=8, mask_token_id=1, eos_token_id=2, suppress_special=False)
    rules = DecodeRules.of(keys, mask_token_id=9, eos_token_id=7, special_ids=[5])
    assert (rules.mask_token_id, rules.eos_token_id, rules.distribution.suppressed_ids) == (1, 2, ())


@pytest.mark.parametrize(
    "keys, ids, message",
    [
        (DecodeKeys(block_size=8), {"eos_token_id": 1}, "mask_token_id is null"),
        (DecodeKeys(block_size=8), {"mask_token_id": 1}, "eos_token_id is null"),
        (DecodeKeys(block_size=8), {"mask_token_id": 1, "eos_token_id": 1}, "must differ"),
        (DecodeKeys(), {"mask_token_id": 1, "eos_token_id": 2}, "block_size is null"),
    ],
)
def test_incomplete_rules(keys, ids, message):
    with pytest.raises(ConfigError, match=message):
        DecodeRules.of(keys, **ids)
