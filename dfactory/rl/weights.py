"""Transfers weights from the learner to the rollout actors through Ray's object store, never through the disk.

The learner puts each bucket of tensors once, and every rollout actor gets it; on the same node without a copy. Under ZeRO-3
a layer is gathered, copied and put before the next one, so the whole model is never in one place. With LoRA only the
adapters are sent. A set of buckets carries its policy version, and an actor loads a set between two decoding calls, so
that each rollout comes from one version.
"""

import time
import warnings
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import ray
import torch
from torch import nn

BUCKET_BYTES = 256 * 2**20


class WeightSet(NamedTuple):
    """References to one version of the weights in the object store. Small enough to send in messages."""

    version: int
    buckets: list[ray.ObjectRef]  # each {name: (dtype name, array of bytes, shape)}
    nbytes: int
    seconds: float  # to gather and put


def put_weights(version: int, groups: Iterable[dict[str, torch.Tensor]]) -> WeightSet:
    """Put groups of named tensors as they come; a bucket is put as soon as it holds BUCKET_BYTES."""
    started, buckets, total = time.perf_counter(), [], 0
    bucket: dict[str, tuple[str, np.ndarray, tuple[int, ...]]] = {}
    for group in groups:
        for name, tensor in group.items():
            bucket[name] = pack_tensor(tensor)
        size = sum(array.nbytes for _, array, _ in bucket.values())
        if size >= BUCKET_BYTES:
            buckets.append(ray.put(bucket))
            total, bucket = total + size, {}
    if bucket:
        total += sum(array.nbytes for _, array, _ in bucket.values())
        buckets.append(ray.put(bucket))
    return WeightSet(version, buckets, total, time.perf_counter() - started)


def pack_tensor(tensor: torch.Tensor) -> tuple[str, np.ndarray, tuple[int, ...]]:
    """A tensor as (dtype, array of bytes, shape). Bytes because numpy has no bfloat16; Ray passes arrays without a copy."""
    flat = tensor.detach().to("cpu").contiguous().flatten()
    return str(tensor.dtype).removeprefix("torch."), flat.view(torch.uint8).numpy(), tuple(tensor.shape)


def load_weights(module: nn.Module, weights: WeightSet, timeout_s: float) -> None:
    """Copy a set into a module's tensors by name. Raises KeyError for a name that the module does not have."""
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for bucket in weights.buckets:
        for name, (dtype, array, shape) in ray.get(bucket, timeout=timeout_s).items():
            with warnings.catch_warnings():  # the store's bytes are read-only, and copy_ only reads
                warnings.filterwarnings("ignore", "The given buffer is not writable")
                tensor = torch.frombuffer(memoryview(array), dtype=getattr(torch, dtype)).view(shape)
            own[name].data.copy_(tensor)
