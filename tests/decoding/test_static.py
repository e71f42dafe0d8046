"""Forwards of fixed shapes give the tokens of the obvious loop. Recording them as CUDA graphs: tests/engine/test_gpu.py."""

import pytest
import torch

from dfactory.decoding import decode, static
from dfactory.errors import ConfigError
from dfactory.models.policy import Policy
from tests.decoding.conftest import same_rollouts
from tests.decoding.test_decoder import equals_uncached, make_rules, random_prompts


@pytest.fixture
def fixed_shapes(monkeypatch):
    """On a CPU the shapes are the same, and every forward runs."""
    monkeypatch.setattr(static, "FEWEST_KEYS", 1)


@pytest.mark.parametrize("keys", [{}, {"editing_threshold": 0.7, "threshold": 0.4}, {"temperature": 1.0}])
def test_equals_the_uncached_loop(policy, fixed_shapes, keys):
    """Prompts within a block and over several, more of them than slots, and two of the same."""
    prompts = random_prompts(3, 17, 8, 30, 11)
    equals_uncached(policy, [*prompts, prompts[1]], make_rules(batch_size=3, cuda_graphs=True, **keys))


def test_few_shapes_of_a_block_or_two(policy, fixed_shapes, monkeypatch):
    shapes = []
    record = static.Recording.__init__

    def remember(self, policy, cache, block_size, width, keys):
        shapes.append((width, keys))
        record(self, policy, cache, block_size, width, keys)

    monkeypatch.setattr(static.Recording, "__init__", remember)
    prompts, keys = random_prompts(5, 60), {"batch_size": 2, "max_new_tokens": 40}
    rollouts = decode(policy, prompts, make_rules(cuda_graphs=True, **keys))
    assert len(shapes) == len(set(shapes))
    assert {width for width, _ in shapes} == {8, 16}
    assert {keys for _, keys in shapes} <= {64, 112}  # 100 tokens in blocks of 8 are 104, and one block stands in
    same_rollouts(rollouts, decode(policy, prompts, make_rules(**keys)))


def test_a_gpu_records_16_bits_only(policy, monkeypatch):
    monkeypatch.setattr(Policy, "device", torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"float32.*load it in bfloat16, or set decode.cuda_graphs to false"):
        static.StaticForward(policy, None, 8)
