"""Decoding with full attention, by a policy whose answers are scripted; tests/families/ has real models."""

import pytest
import torch

from dfactory.decoding import DecodeKeys, DecodeRules, decode
from dfactory.decoding.decoder import make_decoder
from dfactory.errors import ConfigError
from dfactory.noise import state_before
from dfactory.visibility import dense_mask
from tests.decoding.conftest import Scripted

MASK, EOS = 9, 8


class Whole(Scripted):
    """Sees whole documents, with or without a shift. `masks` are the attention masks of its forwards."""

    sees_whole_document = True

    def __init__(self, script, shift: int = 0):
        super().__init__(10, script)
        self.shift, self.masks = shift, []

    def plan(self, place_RS):
        self.masks.append(dense_mask(place_RS)[0])

    def predicting(self, index_N, position_ids_RS):
        return index_N - self.shift

    def hidden_at(self, chosen_N, inputs_RS, position_ids_RS, visibility):
        return super().hidden_at(chosen_N, inputs_RS, position_ids_RS, visibility, None)


def sure_of(token: int, peak: float = 5.0) -> list[float]:
    return [peak if index == token else 0.0 for index in range(10)]


def rules(**keys) -> DecodeRules:
    return DecodeRules.of(DecodeKeys(**keys).in_blocks_of(None), mask_token_id=MASK, eos_token_id=EOS, canvas=True)


def test_blocks_are_filled_from_left_to_right_and_later_masks_are_in_sight():
    policy = Whole(lambda position, _: sure_of(position % 8))
    (rollout,) = decode(policy, [[1, 2, 3]], rules(max_new_tokens=5, block_size=2, threshold=0.0))
    assert policy.seen == [
        ([1, 2, 3, MASK, MASK, MASK, MASK, MASK], list(range(8))),  # three blocks, the last one of one token
        ([1, 2, 3, 3, 4, MASK, MASK, MASK], list(range(8))),
        ([1, 2, 3, 3, 4, 5, 6, MASK], list(range(8))),
    ]
    assert all(mask.all() for mask in policy.masks)
    assert (rollout.output_ids, rollout.token_ids) == ([3, 4, 5, 6, 7], [3, 4, 5, 6, 7])
    assert (rollout.block_origin, rollout.block_forwards) == (3, [1, 1, 1])
    assert rollout.step_in_block.tolist() == [0] * 5
    assert state_before(rollout, 1, MASK).tolist() == [3, 4, MASK, MASK]


def test_without_a_block_size_the_answer_is_one_block():
    (rollout,) = decode(
        Whole(lambda position, _: sure_of(position % 8)), [[1]], rules(max_new_tokens=6, min_commit=2, threshold=1.0)
    )
    assert (rollout.block_size, rollout.block_forwards) == (6, [3])


def test_a_shift_reads_the_left_neighbour():
    policy = Whole(lambda position, _: sure_of(position % 8), shift=1)
    (rollout,) = decode(policy, [[1, 2, 3]], rules(max_new_tokens=4, threshold=0.0))
    assert rollout.output_ids == [2, 3, 4, 5]


def test_canvases_of_a_batch_do_not_see_each_other():
    policy = Whole(lambda position, _: sure_of(position % 8))
    decode(policy, [[1, 2, 3], [4]], rules(max_new_tokens=2, threshold=0.0))
    (seen,) = policy.seen
    assert seen == ([1, 2, 3, MASK, MASK, 4, MASK, MASK], [0, 1, 2, 3, 4, 0, 1, 2])
    expected = torch.block_diag(torch.ones(5, 5), torch.ones(3, 3)).bool()
    assert torch.equal(policy.masks[0], expected)


def test_eos_ends_the_response_after_its_block():
    policy = Whole(lambda position, _: sure_of(EOS if position == 2 else 1))
    (rollout,) = decode(policy, [[1]], rules(max_new_tokens=6, block_size=2, threshold=0.0))
    assert (rollout.output_ids, rollout.forwards) == ([1, EOS], 1)


def test_further_ids_end_a_response_and_none_comes_out_early():
    """The model would write 3 at every position, then EOS where 3 cannot come out."""
    odds = [3.0 if token == 3 else 2.0 if token == EOS else float(token == 1) for token in range(10)]
    policy = Whole(lambda position, _: odds)
    keys = {"max_new_tokens": 6, "block_size": 2, "threshold": 0.0}
    (rollout,) = decode(policy, [[1]], rules(**keys, stop_token_ids=[3]))
    assert (rollout.output_ids, rollout.token_ids, rollout.finish_reason) == ([3], [3, 3], "eos")
    (rollout,) = decode(policy, [[1]], rules(**keys, stop_token_ids=[3], min_new_tokens=3))
    assert (rollout.output_ids, rollout.token_ids) == ([1, 1, 1, 3], [1, 1, 1, 3])
    (rollout,) = decode(policy, [[1]], rules(**keys, min_new_tokens=6))
    assert (rollout.output_ids, rollout.finish_reason) == ([3] * 6, "length")


def test_guidance_runs_a_second_canvas_without_the_prompt():
    """Logits are scripted by forward and position, so both canvases say the same, and guidance changes nothing."""
    policy = Whole(lambda position, _: sure_of(position % 8))
    guided, plain = rules(max_new_tokens=2, threshold=0.0, cfg_scale=2.0), rules(max_new_tokens=2, threshold=0.0)
    decoder = make_decoder(policy, guided, 2, 5)
    decoder.add(0, [1, 2, 3], guided)
    decoder.add(1, [4], plain)
    found = {progress.prompt: progress.rollout.output_ids for progress in decoder.step()}
    assert found == {0: [3, 4], 1: [1, 2]}
    (seen,) = policy.seen
    assert seen[0] == [1, 2, 3, MASK, MASK, 4, MASK, MASK, MASK, MASK, MASK, MASK, MASK]
    assert policy.masks[0].equal(torch.block_diag(torch.ones(5, 5), torch.ones(3, 3), torch.ones(5, 5)).bool())


def test_rules_and_model_have_to_agree():
    block_causal = DecodeRules.of(DecodeKeys(block_size=2), mask_token_id=MASK, eos_token_id=EOS)
    with pytest.raises(ConfigError, match=r"DecodeRules\.canvas False, but the model sees whole documents"):
        decode(Whole(lambda position, _: sure_of(1)), [[1]], block_causal)
    with pytest.raises(ConfigError, match=r"DecodeRules\.canvas True, but the model sees clean blocks"):
        decode(Scripted(10, lambda position, _: sure_of(1)), [[1]], rules(max_new_tokens=2))
    with pytest.raises(ConfigError, match=r"decode\.cuda_graphs true with full attention"):
        decode(Whole(lambda position, _: sure_of(1)), [[1]], rules(max_new_tokens=2, cuda_graphs=True))
