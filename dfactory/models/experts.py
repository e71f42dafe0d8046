"""Routed experts by one grouped matmul for all of them, exact and without a scattered sum in either direction.

transformers' own form gathers the tokens of each expert by indexing, whose gradient adds rows one by one: 9 percent of a
training step on a CPU. Every token has exactly K rows, so that gathering by the inverse permutation and a sum over K is
the same sum.

In bfloat16 on a CPU the groups are filled up to few different sizes. oneDNN, which multiplies bfloat16 matrices there,
compiles a kernel for every shape that it has not met. How many tokens an expert gets is new in nearly every layer of
every step, so that compiling took longer than multiplying.

Letters: T tokens, K experts of each, E experts, S = T K pairs, P rows (pairs and filling), H hidden size.
"""

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm
from transformers.integrations.moe import ExpertsInterface

EXPERTS = "dfactory_grouped_mm"  # what a model's config names as its experts implementation

ROUND = 64  # rows of a filled group; fewer an expert have few sizes anyway, and would mostly be filling


class _Spread(torch.autograd.Function):
    """Tokens [T, H] -> rows [P, H]: row p holds token `token_P[p]`, and `row_TK` says where each token's rows stand."""

    @staticmethod
    def forward(ctx, hidden_TH, token_P, row_TK):
        ctx.save_for_backward(row_TK)
        return hidden_TH.index_select(0, token_P)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_PH):
        (row_TK,) = ctx.saved_tensors
        return grad_PH.index_select(0, row_TK.flatten()).view(*row_TK.shape, -1).sum(dim=1), None, None


class _Collect(torch.autograd.Function):
    """Rows [P, H] -> those of each token [T, K, H]; filling has no part in it, nor a gradient."""

    @staticmethod
    def forward(ctx, rows_PH, row_TK):
        ctx.save_for_backward(row_TK)
        ctx.rows = len(rows_PH)
        return rows_PH.index_select(0, row_TK.flatten()).view(*row_TK.shape, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TKH):
        (row_TK,) = ctx.saved_tensors
        grad_PH = grad_TKH.new_zeros((ctx.rows, grad_TKH.shape[-1]))
        return grad_PH.index_copy_(0, row_TK.flatten(), grad_TKH.flatten(0, 1)), None


def _experts_function(module, hidden_TH, expert_TK, weight_TK) -> torch.Tensor:
    """What transformers' MoE modules call: tokens, the experts of each and their weights -> [T, H]."""
    expert_S, pair_S = expert_TK.flatten().sort(stable=True)
    expert_E = torch.arange(module.num_experts, device=expert_S.device)
    end_E = torch.searchsorted(expert_S, expert_E, right=True)  # behind each expert's rows
    row_S, rows = torch.arange(len(expert_S), device=expert_S.device), len(expert_S)
    slow = hidden_TH.device.type == "cpu" and hidden_TH.dtype == torch.bfloat16
    if slow and rows >= ROUND * module.num_experts:
        size_E = end_E.diff(prepend=end_E.new_zeros(1))
        filling_E = -size_E % ROUND
        row_S = row_S + (filling_E.cumsum(0) - filling_E)[expert_S]
        end_E = end_E + filling_E.cumsum(0)
        rows = int(end_E[-1])
    token_P = pair_S.new_zeros(rows).index_copy_(0, row_S, pair_S // expert_TK.shape[1])  # filling: any token
    row_TK = torch.empty_like(pair_S).index_copy_(0, pair_S, row_S).view_as(expert_TK)

    end_E = end_E.int()
    rows_PH = _Spread.apply(hidden_TH, token_P, row_TK)
    gated_PI = module._apply_gate(grouped_mm(rows_PH, module.gate_up_proj.transpose(1, 2), offs=end_E))
    out_PH = grouped_mm(gated_PI, module.down_proj.transpose(1, 2), offs=end_E)
    out_TKH = _Collect.apply(out_PH, row_TK)
    return (out_TKH * weight_TK[..., None]).sum(dim=1).to(hidden_TH.dtype)


def register() -> None:
    ExpertsInterface.register(EXPERTS, _experts_function)
