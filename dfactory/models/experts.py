"""Experts by transformers' grouped matmul; in bfloat16 on a CPU, in groups of few different sizes.

oneDNN, which multiplies bfloat16 matrices there, compiles a kernel for every shape that it has not met. How many tokens an
expert gets is new in nearly every layer of every step, so that compiling took longer than multiplying. With every group
filled up to a multiple of ROUND by tokens of zeros, whose weight is zero too, a handful of shapes comes back for ever.
"""

import math

import torch
from torch.nn import functional as F
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

EXPERTS = "dfactory_grouped_mm"  # what a model's config names as its experts implementation

ROUND = 64  # tokens; fewer tokens an expert have few sizes anyway, and would mostly be filling


def _experts_function(module, hidden_TH, expert_TK, weight_TK) -> torch.Tensor:
    """What transformers' MoE modules call: tokens, the experts of each and their weights -> [T, H]."""
    slow = hidden_TH.device.type == "cpu" and hidden_TH.dtype == torch.bfloat16
    if not slow or expert_TK.numel() < ROUND * module.num_experts:
        return grouped_mm_experts_forward(module, hidden_TH, expert_TK, weight_TK)
    choices = expert_TK.shape[1]
    missing_E = -expert_TK.flatten().bincount(minlength=module.num_experts) % math.lcm(ROUND, choices)
    filling_PK = torch.arange(module.num_experts).repeat_interleave(missing_E).view(-1, choices)
    below = (0, 0, 0, len(filling_PK))
    filled_TK = torch.cat([expert_TK, filling_PK])
    out = grouped_mm_experts_forward(module, F.pad(hidden_TH, below), filled_TK, F.pad(weight_TK, below))
    return out[: len(hidden_TH)]


def register() -> None:
    ExpertsInterface.register(EXPERTS, _experts_function)
