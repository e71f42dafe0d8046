"""A small configuration out of a large one: the same switches, narrow and shallow. The self-check runs such models.

Widths, counts and token ids become small. Everything else stays: ties, biases, norms, multipliers, activations, the kind
of rotation. Of layers that a list tells apart (which rotate, which have experts) one of each kind is kept.

    shrink({"num_hidden_layers": 36, "hidden_size": 2048, "no_rope_layers": [1, 1, 1, 0, ...], "rms_norm_eps": 1e-6})
        -> {"num_hidden_layers": 3, "hidden_size": 64, "no_rope_layers": [1, 1, 0], "rms_norm_eps": 1e-6}
"""

from collections.abc import Mapping
from typing import Any

VOCABULARY = 160
HEADS = 4
LAYERS = 3  # at least
MOST_LAYERS = 6
WINDOW = 4  # of windows and chunks: shorter than the rows of the self-check, so that one shows

_FIXED = {
    "vocab_size": VOCABULARY,
    "num_attention_heads": HEADS,
    "head_dim": 16,
    "hidden_size": 64,
    "intermediate_size": 96,
    "ffn_hidden_size": 96,
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "v_head_dim": 12,
    "n_group": 2,
    "topk_group": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
_MOST = {
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 2,
    "num_shared_experts": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def shrink(keys: Mapping[str, Any], aliases: Mapping[str, str] = {}, keep_windows: bool = False) -> dict[str, Any]:
    """A small configuration's keys, from those of a large one. `aliases` maps transformers' names to those of the keys."""
    own_names = {own: name for name, own in aliases.items()}
    keys = {own_names.get(name, name): value for name, value in keys.items()}
    layers = keys["num_hidden_layers"]
    kept = _kinds_of_layers(keys, layers)
    small = {name: _small_value(name, value, layers, kept) for name, value in keys.items()}
    small |= _related(keys, small) | {"num_hidden_layers": len(kept)}
    if keep_windows and "sliding_window" in keys:
        small["sliding_window"] = keys["sliding_window"]
    return {aliases.get(name, name): value for name, value in small.items()}


def _related(keys: Mapping[str, Any], small: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes that depend on each other."""
    related: dict[str, Any] = {}
    heads, head = keys["num_attention_heads"], keys.get("head_dim")
    if keys.get("num_key_value_heads") is not None:
        related["num_key_value_heads"] = _key_heads(keys)
    if keys.get("n_group") == 1:
        related |= {"n_group": 1, "topk_group": 1}
    if head is not None and "qk_rope_head_dim" in keys:  # there it is the part that rotates
        related["head_dim"] = small["qk_rope_head_dim"]
    elif head is not None and head * heads != keys["hidden_size"]:
        related["hidden_size"] = 48  # not what the heads have together
    return related


def _key_heads(keys: Mapping[str, Any]) -> int:
    """As many as there are query heads, or one, or some in between, as in the large model."""
    heads, stated = keys["num_attention_heads"], keys["num_key_value_heads"]
    return HEADS if stated == heads else 1 if stated == 1 else HEADS // 2


def _kinds_of_layers(keys: Mapping[str, Any], layers: int) -> list[int]:
    """One layer of each kind that the lists tell apart, the last one, and more from the first on, up to LAYERS in all."""
    per_layer = [value for value in keys.values() if isinstance(value, list) and len(value) == layers]
    numbers = [value for name, value in keys.items() if _numbers_layers(name, value, layers)]
    first: dict[str, int] = {}
    for layer in range(layers):
        first.setdefault(repr([[v[layer] for v in per_layer], [layer in v for v in numbers]]), layer)
    kept = sorted({*sorted(first.values())[: MOST_LAYERS - 1], layers - 1})
    others = (layer for layer in range(layers) if layer not in kept)
    return sorted([*kept, *(layer for layer, _ in zip(others, range(LAYERS - len(kept)), strict=False))])


def _numbers_layers(name: str, value: Any, layers: int) -> bool:
    """Whether a key lists layers by number, as mlp_only_layers does."""
    return "layers" in name and isinstance(value, list) and len(value) != layers and all(type(v) is int for v in value)


def _small_value(name: str, value: Any, layers: int, kept: list[int]) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, list) and len(value) == layers:
        return [value[layer] for layer in kept]
    if _numbers_layers(name, value, layers):
        return [kept.index(layer) for layer in value if layer in kept]
    if name.endswith("_token_id"):
        return _FIXED.get(name, 0)
    if not isinstance(value, int):
        return value
    if "window" in name or "chunk_size" in name:
        return min(value, WINDOW)
    if name in _EXPERTS:
        return min(value, 8)
    if name in _MOST:
        return min(value, _MOST[name])
    if name.endswith("intermediate_size") and name != "intermediate_size":
        return min(value, 32)
    return _FIXED.get(name, value)
