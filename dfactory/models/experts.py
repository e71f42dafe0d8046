"""Routed experts by one grouped matmul for all of them, exact and without a scattered sum in either direction.

transformers' own form gathers the tokens of each expert by indexing, whose gradient adds rows one by one: 9 percent of a
training step on a CPU. Every token has exactly K rows, so that gathering by the inverse permutation and a sum over K is
the same sum.

In bfloat16 on a CPU the groups are filled up to few different sizes. oneDNN, which multiplies bfloat16 matrices there,
compiles a kernel for every shape that it has not met. How many tokens an expert gets is new in nearly every layer of
every step, so that compiling took longer than multiplying.

Letters: T tokens, K experts of each, E experts, S = T K pairs, P rows (pairs and filling), H hidden size.
"""

from collections.abc import Iterator

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

EXPERTS = "dfactory_grouped_mm"  # what a model's config names as its experts implementation

# How experts are stored that are computed here; transformers' own grouped matmul takes the others.
_LAYOUT = {"has_gate": True, "has_bias": False, "is_transposed": False, "has_post_expert_norm": False}

PART_BYTES = 2**20  # of float32 rows that are computed at a time
ROUND = 64  # rows of a filled group; fewer an expert have few sizes anyway, and would mostly be filling


@torch.library.custom_op("dfactory::grouped_mm", mutates_args=())
def _compiled_grouped_mm(rows_PH: torch.Tensor, weight_EIH: torch.Tensor, end_E: torch.Tensor) -> torch.Tensor:
    """torch's grouped matmul as torch.compile takes it, which knows that of bfloat16 alone."""
    return grouped_mm(rows_PH, weight_EIH.transpose(1, 2), offs=end_E)


@_compiled_grouped_mm.register_fake
def _(rows_PH, weight_EIH, end_E):
    return rows_PH.new_empty(rows_PH.shape[0], weight_EIH.shape[1])


def _grouped_mm(rows_PH: torch.Tensor, weight_EIH: torch.Tensor, end_E: torch.Tensor) -> torch.Tensor:
    """[P, H] -> [P, I]: each group of rows times the transposed matrix of its expert."""
    if torch.compiler.is_compiling():
        return _compiled_grouped_mm(rows_PH, weight_EIH, end_E)
    return grouped_mm(rows_PH, weight_EIH.transpose(1, 2), offs=end_E)


def _parts(count: int, like_PH: torch.Tensor, each: int = 1) -> Iterator[slice]:
    """Cuts `count` items of `each` rows so that on a CPU what is computed of a part stays in its cache: one walk through
    memory instead of one for every operation. A GPU takes all at once, and so does compiled code, which walks once."""
    if torch.compiler.is_compiling():
        return iter((slice(0, count),))
    step = max(1, PART_BYTES // (4 * each * like_PH.shape[-1])) if like_PH.device.type == "cpu" else max(1, count)
    return (slice(start, start + step) for start in range(0, count, step))


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
        tokens, most = row_TK.shape
        grad_TH = grad_PH.new_empty((tokens, grad_PH.shape[-1]))
        for part in _parts(tokens, grad_PH, most):
            grad_TH[part] = _rows(grad_PH, row_TK[part]).sum(dim=1)
        return grad_TH, None, None


class _Collect(torch.autograd.Function):
    """Rows [P, H] -> tokens [T, H]: the weighted sum of each token's rows. Filling has no part in it, nor a gradient.
    Products and sums are made in the precision of the weights."""

    @staticmethod
    def forward(ctx, rows_PH, weight_TK, row_TK, token_P):
        ctx.save_for_backward(rows_PH, weight_TK, row_TK, token_P)
        return _collected(rows_PH, weight_TK, row_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TH):
        rows_PH, weight_TK, row_TK, token_P = ctx.saved_tensors
        weight_P = weight_TK.new_zeros(len(rows_PH)).index_copy_(0, row_TK.flatten(), weight_TK.flatten())
        grad_PH, grad_P = torch.empty_like(rows_PH), torch.empty_like(weight_P)
        for part in _parts(len(rows_PH), rows_PH):
            of_token_PH = grad_TH.index_select(0, token_P[part]).to(weight_P.dtype)
            grad_PH[part] = of_token_PH * weight_P[part, None]
            grad_P[part] = of_token_PH.mul_(rows_PH[part]).sum(dim=1)
        return grad_PH, grad_P[row_TK], None, None


def _collected(rows_PH: torch.Tensor, weight_TK: torch.Tensor, row_TK: torch.Tensor) -> torch.Tensor:
    """[T, H]"""
    parts = [
        (_rows(rows_PH, row_TK[part]) * weight_TK[part, :, None]).sum(dim=1).to(rows_PH.dtype)
        for part in _parts(len(row_TK), rows_PH, row_TK.shape[1])
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _rows(rows_PH: torch.Tensor, row_TK: torch.Tensor) -> torch.Tensor:
    """[T, K, H]"""
    return rows_PH.index_select(0, row_TK.flatten()).view(*row_TK.shape, -1)


def experts_function(module, hidden_TH, expert_TK, weight_TK) -> torch.Tensor:
    """What transformers' MoE modules call: tokens, the experts of each and their weights -> [T, H]."""
    if any(getattr(module, name, usual) != usual for name, usual in _LAYOUT.items()):
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, hidden_TH, expert_TK, weight_TK)
    expert_S, pair_S = expert_TK.flatten().sort(stable=True)
    expert_E = torch.arange(module.num_experts, device=expert_S.device)
    end_E = torch.searchsorted(expert_S, expert_E, right=True)  # one past each expert's rows
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
    trains = torch.is_grad_enabled()  # else the calls around the gradients cost a small forward 4 percent of its time
    rows_PH = _Spread.apply(hidden_TH, token_P, row_TK) if trains else hidden_TH.index_select(0, token_P)
    gated_PI = module._apply_gate(_grouped_mm(rows_PH, module.gate_up_proj, end_E))
    out_PH = _grouped_mm(gated_PI, module.down_proj, end_E)
    return _Collect.apply(out_PH, weight_TK, row_TK, token_P) if trains else _collected(out_PH, weight_TK, row_TK)


def register() -> None:
    ExpertsInterface.register(EXPERTS, experts_function)
