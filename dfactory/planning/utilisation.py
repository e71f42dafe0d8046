"""Model FLOPs utilisation: what a step has to compute, as a share of what the device could have computed in its time.

    a position     2 x the parameters that it passes through, embedding and head left out; twice that in the backward pass
    a target       2 H V in the head, likewise
    a pair         4 heads x d in attention: two products of a query and a key that it sees, likewise

Only what the method needs is counted: recomputation is not, nor are tiles of a mask that no query sees, and the last layer
counts at the targets where it is computed there alone. So the share is a lower bound of the device's work.
"""

from typing import NamedTuple

import numpy as np
from transformers import PreTrainedConfig

from dfactory.planning.memory import ParameterCounts
from dfactory.types import PADDING, ViewBatch

PASSES = 3  # a backward pass is two forwards: the gradients of what goes in, and of the weights

# bfloat16 without sparsity, by data sheets: a part of torch's name of the device, TFLOP/s
DEVICE_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "GH200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10G": 70.0,
    "RTX 4090": 165.0,
}


class Pairs(NamedTuple):
    """Of queries and the keys that they see."""

    all: int
    of_targets: int  # whose query is a target


def visible_pairs(batch: ViewBatch) -> Pairs:
    """Exactly, by dfactory.visibility's rule without a sliding window: the tokens of a query's own block in its own stream,
    and the clean tokens of earlier blocks of its document and its shared prefix."""
    document, view, block, trunk = (field.numpy().astype(np.int64) for field in batch.place_RS)
    row = np.broadcast_to(np.arange(len(document))[:, None], document.shape)
    blocks, documents = block.max(initial=0) + 2, document.max(initial=0) + 1
    real = document != PADDING

    def code(of: np.ndarray) -> np.ndarray:
        """Of (row, document, block): ascends with the block."""
        return (row * documents + of) * blocks + block

    _, stream, size = np.unique(
        code(document)[real] * (view.max(initial=0) + 1) + view[real], return_inverse=True, return_counts=True
    )
    seen = np.zeros(document.shape, np.int64)
    seen[real] = size[stream]
    clean = np.sort(code(document)[real & (view == 0)])
    for of, counts in ((document, real), (trunk, real & (trunk != document))):
        here = code(of)[counts]
        seen[counts] += np.searchsorted(clean, here) - np.searchsorted(clean, here - block[counts])
    return Pairs(int(seen.sum()), int(seen.reshape(-1)[batch.target_index_N.numpy()].sum()))


def model_flops(
    config: PreTrainedConfig, counts: ParameterCounts, batch: ViewBatch, ends_at_targets: bool, frozen: bool = False
) -> float:
    """Of forward and backward of a micro-batch, whose tensors are on the CPU. `frozen`: the weights have no gradients, as
    with LoRA, whose own matrices do not count."""
    layers, pairs = config.num_hidden_layers, visible_pairs(batch)
    vocabulary = config.vocab_size * config.hidden_size
    in_layers = (counts.active - counts.vocabulary) / layers
    whole = layers - ends_at_targets
    positions = whole * batch.num_tokens + ends_at_targets * batch.num_targets
    heads = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    attention = 4 * heads * (whole * pairs.all + ends_at_targets * pairs.of_targets)
    return PASSES * attention + (PASSES - frozen) * 2 * (in_layers * positions + vocabulary * batch.num_targets)


def peak_of(device_name: str, dtype: str) -> float | None:
    """TFLOP/s of a device that torch calls so, if its data sheet is known."""
    if dtype != "bfloat16":
        return None
    return next((peak for name, peak in DEVICE_TFLOPS.items() if name in device_name), None)
