"""Norms in bfloat16 on a CPU: the same bits forward, a gradient nearer to the exact one, and only where a norm is plain."""

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dfactory.models import norms

SIZE = 48


class Shifted(LlamaRMSNorm):
    """As some families have it: the weight is stored less one."""

    def forward(self, hidden_states):
        normal = hidden_states.float() * torch.rsqrt(hidden_states.float().pow(2).mean(-1, keepdim=True) + 1e-5)
        return ((1 + self.weight.float()) * normal).to(hidden_states.dtype)


def norm_with_weights(kind=LlamaRMSNorm, dtype=torch.bfloat16):
    norm = kind(SIZE, eps=1e-5)
    norm.weight.data = torch.randn(SIZE, generator=torch.Generator().manual_seed(1))
    return norm.to(dtype)


def outcome(norm, dtype=torch.bfloat16):
    """What it makes of 2 x 300 rows, and the gradients of rows and weight."""
    g = torch.Generator().manual_seed(0)
    hidden, upstream = (torch.randn(2, 300, SIZE, generator=g).bfloat16().to(dtype) for _ in range(2))
    hidden.requires_grad_()
    out = norm(hidden)
    return [out.detach(), *torch.autograd.grad(out, [hidden, norm.weight], upstream)]


@pytest.mark.parametrize("block", [SIZE, 7 * SIZE, 2**17], ids=lambda block: f"{block} numbers a block")
def test_gradients_are_nearer_to_the_exact_ones_than_autograds(monkeypatch, block):
    monkeypatch.setattr(norms, "BLOCK", block)
    plain, adopted = norm_with_weights(), norm_with_weights()
    norms.adopt(adopted)
    exact = outcome(norm_with_weights(dtype=torch.bfloat16).float(), torch.float32)
    before, after = outcome(plain), outcome(adopted)
    assert torch.equal(before[0], after[0])
    for old, new, true in zip(before[1:], after[1:], exact[1:], strict=True):
        assert (new.float() - true).norm() <= (old.float() - true).norm()
        assert (new.float() - true).norm() < 3e-3 * true.norm()


def test_only_training_in_bfloat16_goes_another_way():
    norm, plain = norm_with_weights(dtype=torch.float32), norm_with_weights(dtype=torch.float32)
    norms.adopt(norm)
    assert isinstance(norm, norms._Norm)
    for got, expected in zip(outcome(norm, torch.float32), outcome(plain, torch.float32), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("rows", [1, 32, 37, 300])
@pytest.mark.parametrize("width", [SIZE, 64, 1000])
def test_without_a_gradient_one_call_gives_the_same_bits(rows, width):
    plain, adopted = (LlamaRMSNorm(width, eps=1e-5) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    plain.weight.data = adopted.weight.data = torch.randn(width, generator=generator)
    norms.adopt(adopted)
    hidden = 3 * torch.randn(1, rows, width, generator=generator)
    with torch.no_grad():
        assert torch.equal(adopted(hidden), plain(hidden))


def test_a_frozen_weight_gets_no_gradient():
    norm = norm_with_weights().requires_grad_(False)
    norms.adopt(norm)
    hidden = torch.randn(3, SIZE).bfloat16().requires_grad_()
    norm(hidden).sum().backward()
    assert hidden.grad is not None
    assert norm.weight.grad is None


@pytest.mark.parametrize("kind", [Shifted, Gemma2RMSNorm, nn.LayerNorm])
def test_other_norms_stay_as_they_are(kind):
    norm = kind(SIZE, eps=1e-5)
    norms.adopt(norm)
    assert type(norm) is kind
