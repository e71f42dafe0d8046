"""The opponent's model: what a good engineer assembles from the best public parts for block diffusion, in our own words.

The benchmarks of speed compare dFactory with it. It shares nothing with dFactory but the transformers class that reads the
model directory and holds the parameters. What it does:

    rows        noisy ++ clean, 2L positions a document and view, as BD3-LM, SDAR and LLaDA2's own training have them
    attention   scaled_dot_product_attention under a mask that is made once a micro-batch; compiled flex_attention with a
                block mask on CUDA
    experts     tokens sorted by expert, one grouped matmul for all experts of a layer
    head        logits at the targets only, some targets at a time, with gradients made in the forward pass, so that logits
                are computed once (as in Liger's fused linear cross-entropy)
    norms       torch's fused rms_norm

Training and decoding with it are in opponent_training.py and opponent_decoding.py. tests/test_opponent.py holds its losses
and tokens to tests/reference.py.

Letters: R rows, S positions of a row, T = R S tokens, K experts a token, H hidden size, d head size, N targets, V ids.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from dfactory import distributed
from dfactory.models.families.base import FAMILIES
from dfactory.models.registry import read_config

LOGIT_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}  # fp32 logits that exist at a time

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""query [R, heads, S, d], key and value [R, heads, S', d] -> [R, heads, S, d]."""


class PeerCache:
    """Keys and values of all layers, in tensors that are allocated once. `start` is the column of the next forward."""

    def __init__(self, model: "Peer", rows: int, columns: int):
        config, device = model.config, model.device
        shape = (config.num_hidden_layers, 2, rows, config.num_key_value_heads, columns, model.head_dim)
        self.kept = torch.zeros(shape, device=device, dtype=model.dtype)
        self.start = 0

    def extend(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values [R, kv heads, S, d] from column `start` on. Returns all up to there."""
        stop = self.start + key.shape[2]
        for kept, new in zip(self.kept[layer], (key, value), strict=True):
            kept[:, :, self.start : stop] = new
        keys, values = self.kept[layer, :, :, :, :stop]
        return keys, values

    def repeat(self, row_R: torch.Tensor) -> None:
        """Rows in this order: one prompt for several responses."""
        self.kept = self.kept.index_select(2, row_R)


class Peer:
    """A block-diffusion model without dFactory's forward: LLaDA2-MoE, Qwen3 and Llama by transformers' module names."""

    def __init__(self, model_dir: str | Path, dtype: torch.dtype = torch.float32):
        config = read_config(Path(model_dir))
        options = {"config": config, "dtype": dtype, "attn_implementation": "sdpa", "use_safetensors": True}
        self.model = FAMILIES.variant_of(config).model_class.from_pretrained(model_dir, **options)
        self.model.to(distributed.device()).eval()
        self.config, self.head_dim = config, self.model.model.layers[0].self_attn.head_dim
        self.parameters: list[nn.Parameter] = [p for p in self.model.parameters() if p.requires_grad]

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def head(self) -> torch.Tensor:
        return self.model.lm_head.weight

    def hidden(self, ids_RS: torch.Tensor, position_RS: torch.Tensor, attend: Attend, cache: PeerCache | None = None):
        """[R, S, H], before the last norm."""
        inner = self.model.model
        hidden_RSH = inner.embed_tokens(ids_RS)
        turn = inner.rotary_emb(hidden_RSH, position_RS)
        for number, layer in enumerate(inner.layers):
            normed = _norm(layer.input_layernorm, hidden_RSH)
            hidden_RSH = hidden_RSH + self._attention(layer.self_attn, number, normed, turn, attend, cache)
            hidden_RSH = hidden_RSH + _feed_forward(layer.mlp, _norm(layer.post_attention_layernorm, hidden_RSH))
        return hidden_RSH

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the head multiplies, of any of the positions of `hidden`."""
        return _norm(self.model.model.norm, hidden)

    def _attention(self, part: nn.Module, number: int, hidden_RSH, turn, attend: Attend, cache: PeerCache | None):
        q, k, v = (
            project(hidden_RSH).unflatten(-1, (-1, self.head_dim))
            for project in (part.q_proj, part.k_proj, part.v_proj)
        )
        if hasattr(part, "q_norm"):
            q, k = _norm(part.q_norm, q), _norm(part.k_norm, k)
        q, k, v = _turned(q.transpose(1, 2), turn), _turned(k.transpose(1, 2), turn), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(number, k, v)
        if (groups := q.shape[1] // k.shape[1]) > 1:  # on a CPU faster than SDPA with enable_gqa
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return part.o_proj(attend(q, k, v).transpose(1, 2).flatten(2))


def masked(mask: torch.Tensor) -> Attend:
    """SDPA under a mask, True where a query may see a key, that broadcasts to [R, heads, S, S']. It is made a float mask
    once: SDPA on a CPU would convert a boolean one in each layer."""
    added = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=added.to(q.dtype))


def noisy_clean_mask(length: int, block: int, device: torch.device) -> torch.Tensor:
    """[1, 1, 2L, 2L] of noisy ++ clean rows. Documents that are padded at their end need no other: no token sees later
    blocks."""
    block_L = torch.arange(length, device=device) // block
    q, k = block_L[:, None], block_L[None]
    noisy = torch.cat([q == k, k < q], dim=1)
    clean = torch.cat([torch.zeros_like(q == k), k <= q], dim=1)
    return torch.cat([noisy, clean])[None, None]


def training_attention(length: int, block: int, device: torch.device) -> Attend:
    """Attention of noisy ++ clean rows of 2 `length` positions."""
    if device.type != "cuda":
        return masked(noisy_clean_mask(length, block, device))
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def sees(row, head, q, k):
        block_q, block_k = q % length // block, k % length // block
        from_noisy = torch.where(k < length, block_q == block_k, block_k < block_q)
        return torch.where(q < length, from_noisy, (k >= length) & (block_k <= block_q))

    block_mask = create_block_mask(sees, None, None, 2 * length, 2 * length, device=str(device), _compile=True)
    compiled = torch.compile(flex_attention, dynamic=True)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)


def _norm(norm: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _turned(heads: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary embedding of [R, heads, S, d]: pairs (i, i + half) of the first columns, as many as `turn` has; the rest
    passes."""
    cos, sin = (part[:, None] for part in turn)
    size = cos.shape[-1]
    turned, rest = heads[..., :size], heads[..., size:]
    a, b = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-b, a], dim=-1) * sin
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def _feed_forward(mlp: nn.Module, hidden_RSH: torch.Tensor) -> torch.Tensor:
    if not hasattr(mlp, "experts"):
        return mlp.down_proj(F.silu(mlp.gate_proj(hidden_RSH)) * mlp.up_proj(hidden_RSH))
    hidden_TH = hidden_RSH.flatten(0, 1)
    mixed_TH = _experts(mlp.experts, hidden_TH, *_route(mlp, hidden_TH))
    return mixed_TH.view_as(hidden_RSH) + _feed_forward(mlp.shared_experts, hidden_RSH)


def _route(mlp: nn.Module, hidden_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each token and their weights, [T, K], by sigmoids and the best groups, in float32."""
    config = mlp.config
    score_TE = F.linear(hidden_TH.float(), mlp.gate.weight.float()).sigmoid()
    biased_TE = score_TE.detach() + mlp.gate.e_score_correction_bias
    grouped = biased_TE.unflatten(-1, (config.n_group, -1))
    best = grouped.topk(2, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1, sorted=False).indices
    kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, True)
    biased_TE = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1)
    chosen_TK = biased_TE.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices
    weight_TK = score_TE.gather(1, chosen_TK)
    if config.norm_topk_prob:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
    return chosen_TK, weight_TK * config.routed_scaling_factor


def _experts(experts: nn.Module, hidden_TH: torch.Tensor, chosen_TK: torch.Tensor, weight_TK: torch.Tensor):
    """Tokens sorted by expert, two grouped matmuls, and each token's rows weighted and summed."""
    gate_up, down = experts.gate_up_proj, experts.down_proj
    expert, order = chosen_TK.flatten().sort(stable=True)
    token = order // chosen_TK.shape[1]
    ends = torch.bincount(expert, minlength=len(gate_up)).cumsum(0).int()
    gate, up = F.grouped_mm(hidden_TH[token], gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    out = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
    out = out * weight_TK.flatten()[order, None].to(out.dtype)
    return torch.zeros_like(hidden_TH).index_add(0, token, out)


def target_nll(hidden_NH: torch.Tensor, head_VH: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
    """-log p of each target, without gradients."""
    rows = _rows(head_VH)
    parts = zip(hidden_NH.split(rows), target_N.split(rows), strict=True)
    with torch.no_grad():
        return torch.cat([F.cross_entropy((h @ head_VH.T).float(), t, reduction="none") for h, t in parts])


class TargetLoss(torch.autograd.Function):
    """hidden [N, H], head [V, H], targets [N], their factors [N] -> the sum of factor * -log p; and of -log p, a constant.

    Of a part of the targets at a time the logits are computed, turned into their gradient in place, and
    multiplied into the gradients of hidden states and head.
    """

    @staticmethod
    def forward(ctx, hidden_NH, head_VH, target_N, factor_N):
        rows = _rows(head_VH)
        grad_hidden, grad_head = torch.empty_like(hidden_NH), torch.zeros_like(head_VH)
        total, plain = hidden_NH.new_zeros(2, dtype=torch.float32)
        for start in range(0, len(target_N), rows):
            part = slice(start, start + rows)
            logits, factor = (hidden_NH[part] @ head_VH.T).float(), factor_N[part, None]
            nll, p = _nll_and_p(logits, target_N[part, None])
            total += (factor * nll).sum()
            plain += nll.sum()
            p.scatter_add_(1, target_N[part, None], torch.full_like(nll, -1.0))
            grad_logits = p.mul_(factor).to(head_VH.dtype)
            torch.mm(grad_logits, head_VH, out=grad_hidden[part])
            grad_head.addmm_(grad_logits.T, hidden_NH[part])
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(plain)
        return total, plain

    @staticmethod
    def backward(ctx, upstream, _):
        """`upstream` is 1 for a loss that is divided by its factors."""
        grad_hidden, grad_head = ctx.saved_tensors
        if upstream != 1:
            grad_hidden, grad_head = grad_hidden * upstream, grad_head * upstream
        return grad_hidden, grad_head, None, None


def _rows(head_VH: torch.Tensor) -> int:
    return max(1, LOGIT_BYTES[head_VH.device.type] // (4 * len(head_VH)))


def _nll_and_p(logits: torch.Tensor, target_N1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, 1] and the probabilities [N, V], with one exponential a logit: log of their sum = largest logit - log of its p."""
    top, argmax = logits.max(dim=-1, keepdim=True)
    target_logit = logits.gather(1, target_N1)
    p = logits.softmax(dim=-1)
    return top - p.gather(1, argmax).log() - target_logit, p
