"""Routed experts give what transformers' own loop over them gives, whether their groups are filled up or not."""

import pytest
import torch

from dfactory.models import experts
from dfactory.models.registry import load_policy
from tests.engine.conftest import GOLDEN


def expert_block(dtype):
    policy = load_policy(GOLDEN, dtype=dtype)
    return next(module for name, module in policy.named_modules() if name.endswith("layers.1.mlp"))


def some_tokens(block, tokens):
    drawn = torch.randn(1, tokens, block.experts.hidden_dim, generator=torch.Generator().manual_seed(tokens))
    return drawn.to(block.experts.gate_up_proj.dtype)


def run(block, hidden):
    hidden = hidden.clone().requires_grad_()
    out = block(hidden)
    learnt = [block.experts.gate_up_proj, block.experts.down_proj, block.gate.weight]
    return out.detach(), torch.autograd.grad(out.float().pow(2).sum(), [hidden, *learnt])


@pytest.mark.parametrize("tokens", [1, 40, 333])
def test_outputs_and_gradients_are_those_of_a_loop_over_experts(tokens):
    block = expert_block("float32")
    hidden = some_tokens(block, tokens)
    got = run(block, hidden)
    block.experts.config._experts_implementation = "eager"
    expected = run(block, hidden)
    for ours, theirs in zip([got[0], *got[1]], [expected[0], *expected[1]], strict=True):
        assert (ours - theirs).abs().max() <= 3e-6 * theirs.abs().max()


@pytest.mark.parametrize("tokens", [1, 40, 333])
def test_filled_groups_give_the_same_outputs_and_gradients(monkeypatch, tokens):
    block = expert_block("bfloat16")
    hidden = some_tokens(block, tokens)
    monkeypatch.setattr(experts, "ROUND", 10**9)
    plain = run(block, hidden)

    sizes, multiply = [], experts.grouped_mm

    def remember(rows, weights, *, offs):
        sizes.extend(offs.diff(prepend=offs.new_zeros(1)).tolist())
        return multiply(rows, weights, offs=offs)

    monkeypatch.setattr(experts, "ROUND", 4)
    monkeypatch.setattr(experts, "grouped_mm", remember)
    filled = run(block, hidden)
    torch.testing.assert_close(filled, plain, atol=1e-2, rtol=1e-2)
    if tokens > 1:  # fewer than ROUND an expert are left as they are
        assert all(size % 4 == 0 for size in sizes)
        assert sum(sizes) > 2 * tokens * block.gate.top_k  # both products


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 333])
def test_without_a_gradient_the_bits_are_the_same(dtype, tokens):
    block = expert_block(dtype)
    hidden = some_tokens(block, tokens)
    expected, _ = run(block, hidden)
    with torch.no_grad():
        assert torch.equal(block(hidden), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_computing_in_parts_changes_no_bit(monkeypatch, dtype):
    block = expert_block(dtype)
    hidden = some_tokens(block, 333)
    monkeypatch.setattr(experts, "ROUND", 4)
    whole = run(block, hidden)
    monkeypatch.setattr(experts, "PART_BYTES", 7 * 4 * hidden.shape[-1])  # seven rows at a time
    parts = run(block, hidden)
    torch.testing.assert_close(parts, whole, atol=0, rtol=0)
