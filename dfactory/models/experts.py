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


def _summed(rows_PH: torch.Tensor, row_TK: torch.Tensor) -> torch.Tensor:
    """The rows of each token, added up: [T, H]."""
    return rows_PH.index_select(0, row_TK.flatten()).view(*row_TK.shape, -1).sum(dim=1)


class _Spread(torch.autograd.Function):
    """Tokens [T, H] -> rows [P, H]: row p holds token `token_P[p]`, and `row_TK` says where each token's rows stand."""

    @staticmethod
    def forward(ctx, hidden_TH, token_P, row_TK):
        ctx.save_for_backward(row_TK)
        return hidden_TH.index_select(0, token_P)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_PH):
        return _summed(grad_PH, *ctx.saved_tensors), None, None


class _Collect(torch.autograd.Function):
    """Rows [P, H] -> the sum of each token's rows [T, H]; the other way round."""

    @staticmethod
    def forward(ctx, rows_PH, token_P, row_TK):
        ctx.save_for_backward(token_P)
        return _summed(rows_PH, row_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TH):
        return grad_TH.index_select(0, *ctx.saved_tensors), None, None


def _experts_function(module, hidden_TH, expert_TK, weight_TK) -> torch.Tensor:
    """What transformers' MoE modules call: tokens, the experts of each and their weights -> [T, H].

    A weight is multiplied in front of the last product and not behind it: that is the same, on fewer numbers.
    """
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
    # Filling is any token, of weight 0: nothing comes out of it, and no gradient goes in.
    token_P = pair_S.new_zeros(rows).index_copy_(0, row_S, pair_S // expert_TK.shape[1])
    row_TK = torch.empty_like(pair_S).index_copy_(0, pair_S, row_S).view_as(expert_TK)
    weight_P = weight_TK.new_zeros(rows).scatter(0, row_TK.flatten(), weight_TK.flatten())

    end_E = end_E.int()
    rows_PH = _Spread.apply(hidden_TH, token_P, row_TK)
    gated_PI = module._apply_gate(grouped_mm(rows_PH, module.gate_up_proj.transpose(1, 2), offs=end_E))
    weighted_PI = (gated_PI * weight_P[:, None]).to(hidden_TH.dtype)
    out_PH = grouped_mm(weighted_PI, module.down_proj.transpose(1, 2), offs=end_E)
    return _Collect.apply(out_PH, token_P, row_TK)


def register() -> None:
    ExpertsInterface.register(EXPERTS, _experts_function)
