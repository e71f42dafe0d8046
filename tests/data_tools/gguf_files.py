"""Tiny GGUF files, written with the package gguf: random weights, a byte-level vocabulary."""

from pathlib import Path

import gguf
import numpy as np
from tokenizers import pre_tokenizers

LAYERS, HIDDEN, HEADS, KEYS, INNER, EXPERTS = 2, 64, 4, 2, 96, 4
EXPERT_INNER = 768  # transformers' default, which it takes whatever the file states
TEMPLATE = (
    "{% for m in messages %}<start>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)
Quantisation = gguf.GGMLQuantizationType


def vocabulary() -> list[str]:
    """Specials, reserved tokens, bytes, and one merged pair."""
    return ["<unk>", "<start>", "<end>", "<free_0>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]


def write_gguf(path: Path, quantisation: Quantisation = Quantisation.F32, arch: str = "llama", **changes) -> Path:
    """A decoder of two layers, with tied embeddings unless `tied=False`. `changes`: further metadata, texts or numbers."""
    tied, head = changes.pop("tied", True), changes.pop("head", HIDDEN // HEADS)
    writer = gguf.GGUFWriter(path, arch)
    _describe(writer, quantisation, head, changes)
    rng = np.random.default_rng(0)
    for name, shape in shapes(arch, tied, head).items():
        values = rng.normal(0, 0.3, shape).astype(np.float32) + (1 if "norm" in name else 0)
        kind = quantisation if len(shape) > 1 else Quantisation.F32
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


def shapes(arch: str, tied: bool, head: int) -> dict[str, tuple[int, ...]]:
    rows = len(vocabulary())
    found = {"token_embd.weight": (rows, HIDDEN), "output_norm.weight": (HIDDEN,)}
    found |= {} if tied else {"output.weight": (rows, HIDDEN)}
    for layer in range(LAYERS):
        one = {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)}
        one |= {"attn_q": (HEADS * head, HIDDEN), "attn_output": (HIDDEN, HEADS * head)}
        one |= dict.fromkeys(("attn_k", "attn_v"), (KEYS * head, HIDDEN))
        rooms, ending, inner = ((EXPERTS,), "_exps", EXPERT_INNER) if arch.endswith("moe") else ((), "", INNER)
        one |= dict.fromkeys((f"ffn_gate{ending}", f"ffn_up{ending}"), (*rooms, inner, HIDDEN))
        one |= {f"ffn_down{ending}": (*rooms, HIDDEN, inner)} | ({"ffn_gate_inp": (EXPERTS, HIDDEN)} if rooms else {})
        one |= dict.fromkeys(("attn_q_norm", "attn_k_norm"), (head,)) if arch.startswith("qwen3") else {}
        found |= {f"blk.{layer}.{name}.weight": shape for name, shape in one.items()}
    return found


def _describe(writer: gguf.GGUFWriter, quantisation: Quantisation, head: int, changes: dict[str, str | float]) -> None:
    writer.add_name("A tiny model")
    writer.add_license("apache-2.0")
    writer.add_file_type({"F32": 0, "Q4_1": 3, "Q8_0": 7}[quantisation.name])
    for add, value in (
        (writer.add_block_count, LAYERS),
        (writer.add_context_length, 256),
        (writer.add_embedding_length, HIDDEN),
        (writer.add_feed_forward_length, INNER),
        (writer.add_head_count, HEADS),
        (writer.add_head_count_kv, KEYS),
        (writer.add_rope_freq_base, 1e5),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_dimension_count, head),
        (writer.add_expert_count, EXPERTS * writer.arch.endswith("moe")),
        (writer.add_expert_used_count, 2 * writer.arch.endswith("moe")),
        (writer.add_key_length, head),
        (writer.add_expert_feed_forward_length, EXPERT_INNER),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, "smollm"),
        (writer.add_token_list, vocabulary()),
        (writer.add_token_types, [3] * 4 + [1] * (len(vocabulary()) - 4)),
        (writer.add_token_merges, ["t h"]),
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2),
        (writer.add_unk_token_id, 0),
        (writer.add_pad_token_id, 2),
        (writer.add_chat_template, TEMPLATE),
    ):
        add(value)
    for name, value in changes.items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(name, value)
