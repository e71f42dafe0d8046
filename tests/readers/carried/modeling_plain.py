"""Stands for the original Python files of a LLaDA2 checkpoint, which are not part of this repository: the same interface,
written for this test in plain torch from docs/families.md#llada2-moe. An export carries it along, transformers runs it.

It shares nothing with dFactory: tensors have their original names, and a two-dimensional attention mask (1 for a token)
becomes the block-causal one. docs/readers.md says which of the original files have been run, and where.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

BLOCK_SIZE = 8


class PlainConfig(PreTrainedConfig):
    model_type = "llada2_moe"


class Norm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class FeedForward(nn.Module):
    def __init__(self, hidden: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    def __init__(self, c: PlainConfig):
        super().__init__()
        self.c, heads, kv = c, c.num_attention_heads, c.num_key_value_heads
        self.query_key_value = nn.Linear(c.hidden_size, (heads + 2 * kv) * c.head_dim, bias=False)
        self.dense = nn.Linear(heads * c.head_dim, c.hidden_size, bias=False)
        self.query_layernorm = Norm(c.head_dim, c.rms_norm_eps)
        self.key_layernorm = Norm(c.head_dim, c.rms_norm_eps)

    def forward(self, x: torch.Tensor, seen: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        c, (R, S, _) = self.c, x.shape
        heads, kv, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        q, k, v = self.query_key_value(x).view(R, S, heads + 2 * kv, d).split([heads, kv, kv], dim=2)
        q = self.rotate(self.query_layernorm(q), position)
        k = self.rotate(self.key_layernorm(k), position).repeat_interleave(heads // kv, dim=2)
        scores = torch.einsum("rqhd,rkhd->rhqk", q, k) / math.sqrt(d)
        weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1)
        mixed = torch.einsum("rhqk,rkhd->rqhd", weights, v.repeat_interleave(heads // kv, dim=2))
        return self.dense(mixed.reshape(R, S, heads * d))

    def rotate(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        turned = int(x.shape[-1] * self.c.partial_rotary_factor)
        half = turned // 2
        angle = (position[..., None] * self.c.rope_theta ** (-torch.arange(half) / half))[:, :, None]
        a, b, rest = x[..., :half], x[..., half:turned], x[..., turned:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], dim=-1)


class Gate(nn.Module):
    def __init__(self, c: PlainConfig):
        super().__init__()
        self.c, self.weight = c, nn.Parameter(torch.zeros(c.num_experts, c.hidden_size))
        self.register_buffer("expert_bias", torch.zeros(c.num_experts))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        c, score = self.c, torch.sigmoid(x.float() @ self.weight.float().T)
        groups = (score + self.expert_bias).view(len(x), c.n_group, -1)
        best = groups.topk(2, dim=-1).values.sum(-1).topk(c.topk_group, dim=-1).indices
        kept = torch.zeros(len(x), c.n_group, dtype=torch.bool).scatter(1, best, True)
        chosen = groups.masked_fill(~kept[..., None], -math.inf).flatten(1).topk(c.num_experts_per_tok, dim=-1).indices
        weight = score.gather(1, chosen)
        return chosen, weight / (weight.sum(-1, keepdim=True) + 1e-20) * c.routed_scaling_factor


class Experts(nn.Module):
    def __init__(self, c: PlainConfig):
        super().__init__()
        self.gate = Gate(c)
        self.experts = nn.ModuleList(FeedForward(c.hidden_size, c.moe_intermediate_size) for _ in range(c.num_experts))
        self.shared_experts = FeedForward(c.hidden_size, c.moe_intermediate_size * c.num_shared_experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)
        chosen, weight = self.gate(flat)
        mixed = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, slot = (chosen == number).nonzero(as_tuple=True)
            mixed = mixed.index_add(0, token, expert(flat[token]) * weight[token, slot, None].to(flat.dtype))
        return mixed.view_as(x) + self.shared_experts(x)


class Layer(nn.Module):
    def __init__(self, c: PlainConfig, number: int):
        super().__init__()
        self.input_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.attention = Attention(c)
        self.post_attention_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        dense = number < c.first_k_dense_replace
        self.mlp = FeedForward(c.hidden_size, c.intermediate_size) if dense else Experts(c)

    def forward(self, h: torch.Tensor, seen: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        h = h + self.attention(self.input_layernorm(h), seen, position)
        return h + self.mlp(self.post_attention_layernorm(h))


class Body(nn.Module):
    def __init__(self, c: PlainConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, number) for number in range(c.num_hidden_layers))
        self.norm = Norm(c.hidden_size, c.rms_norm_eps)


class LLaDA2MoeModelLM(PreTrainedModel):
    config_class = PlainConfig

    def __init__(self, config: PlainConfig):
        super().__init__(config)
        self.model = Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor
    ) -> SimpleNamespace:
        block = position_ids // BLOCK_SIZE
        seen = (block[:, :, None] >= block[:, None, :]) & (attention_mask[:, None, :] > 0)
        h = self.model.word_embeddings(input_ids)
        for layer in self.model.layers:
            h = layer(h, seen[:, None], position_ids)
        return SimpleNamespace(logits=self.lm_head(self.model.norm(h)))
