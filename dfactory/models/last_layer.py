"""The last decoder layer, computed only at the positions whose output is read.

At most positions only keys and values are needed: clean tokens and context are never scored. So queries, attention and
everything after it are computed at the requested positions only, with the same results as the whole layer. `adopt` adds this
mode to a layer that has the structure of all families here.

Letters: R packed sequences, S their length, N requested positions, H hidden size, d size of a head.
"""

import sys

import torch
from torch import nn

from dfactory.models import modes
from dfactory.models.attention import AttentionPlan

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


class _LastAttention:
    """The second mode of an attention module, with `chosen_N`: [R, S, H] -> [1, N, H]."""

    def forward(self, hidden_states, chosen_N=None, visibility: AttentionPlan = None, **kwargs):
        if chosen_N is None:
            return super().forward(hidden_states=hidden_states, visibility=visibility, **kwargs)
        # Queries at the chosen positions [1, heads, N, d]; keys and values at all positions [R, kv heads, S, d].
        shape = hidden_states.shape[:2]
        cos_RSd, sin_RSd = kwargs["position_embeddings"]
        query = self._heads(self.q_proj, "q_norm", _at(hidden_states, chosen_N))
        query = self._turned(query, _at(cos_RSd, chosen_N), _at(sin_RSd, chosen_N))
        key = self._turned(self._heads(self.k_proj, "k_norm", hidden_states), cos_RSd, sin_RSd)
        value = self._heads(self.v_proj, None, hidden_states)
        if (cache := kwargs.get("past_key_values")) is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attended = visibility.at(chosen_N, shape).attend(query, key, value, self.scaling)
        return self.o_proj(attended.flatten(2)), None

    def _heads(self, project: nn.Module, norm: str | None, hidden: torch.Tensor) -> torch.Tensor:
        """[r, s, H] -> [r, heads, s, d]"""
        heads = project(hidden).unflatten(-1, (-1, self.head_dim))
        if norm in self._modules:  # not every family normalises queries and keys
            heads = getattr(self, norm)(heads)
        return heads.transpose(1, 2)

    def _turned(self, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Apply the family's rotary embedding. Its function rotates queries and keys together; here the keys are empty."""
        family = sys.modules[self.family.__module__]
        return family.apply_rotary_pos_emb(heads, heads[:, :0], cos, sin)[0]


class _LastLayer:
    """The second mode of a decoder layer, with `chosen_N`: [R, S, H] -> [1, N, H]."""

    def forward(self, hidden_states, chosen_N=None, **kwargs):
        if chosen_N is None:
            return super().forward(hidden_states, **kwargs)
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), chosen_N=chosen_N, **kwargs)
        stream = _at(hidden_states, chosen_N) + attended
        return stream + self.mlp(self.post_attention_layernorm(stream))


def _at(tensor_RSX: torch.Tensor, chosen_N: torch.Tensor) -> torch.Tensor:
    """[1, N, X]"""
    return tensor_RSX.flatten(0, 1).index_select(0, chosen_N)[None]


def adopt(layer: nn.Module) -> bool:
    """Add the second mode to a model's last layer if it has the known structure; modules and names stay. Returns whether it
    has the mode."""
    known = set(layer._modules) == _LAYER and set(layer.self_attn._modules) - {"q_norm", "k_norm"} == _ATTENTION
    if known:
        modes.give(layer, _LastLayer)
        modes.give(layer.self_attn, _LastAttention)
    return known
