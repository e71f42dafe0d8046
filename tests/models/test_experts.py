"""Groups of few sizes give what groups of any size give."""

import pytest
import torch
from transformers.integrations import moe

from dfactory.models import experts
from dfactory.models.registry import load_policy
from tests.engine.conftest import GOLDEN


def run(block, hidden):
    hidden = hidden.clone().requires_grad_()
    out = block(hidden)
    grads = torch.autograd.grad(out.float().pow(2).sum(), [hidden, block.experts.gate_up_proj, block.experts.down_proj])
    return out.detach(), grads


@pytest.mark.parametrize("tokens", [1, 40, 333])
def test_filled_groups_give_the_same_outputs_and_gradients(monkeypatch, tokens):
    policy = load_policy(GOLDEN, dtype="bfloat16")
    block = next(module for name, module in policy.named_modules() if name.endswith("layers.1.mlp"))
    hidden = torch.randn(
        1, tokens, policy.config.hidden_size, generator=torch.Generator().manual_seed(tokens)
    ).bfloat16()
    monkeypatch.setattr(experts, "ROUND", 10**9)
    plain = run(block, hidden)

    sizes = []

    def remember(module, hidden_TH, expert_TK, weight_TK):
        sizes.extend(expert_TK.flatten().bincount(minlength=module.num_experts).tolist())
        return moe.grouped_mm_experts_forward(module, hidden_TH, expert_TK, weight_TK)

    monkeypatch.setattr(experts, "ROUND", 4)
    monkeypatch.setattr(experts, "grouped_mm_experts_forward", remember)
    filled = run(block, hidden)
    torch.testing.assert_close(filled, plain, atol=1e-2, rtol=1e-2)
    if tokens > 1:  # fewer than ROUND an expert are left as they are
        assert all(size % 4 == 0 for size in sizes)
