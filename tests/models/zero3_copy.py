"""Reads model directories straight into ZeRO-3 shards and saves them again: `zero3_copy.py SOURCE TARGET ...`."""

import sys
from pathlib import Path

import deepspeed
from transformers.integrations import HfDeepSpeedConfig

from dfactory import distributed
from dfactory.models.registry import load_policy
from dfactory.models.saving import save_policy


def main() -> None:
    rank, _ = distributed.start()
    keep = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    for source, target in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        policy = load_policy(source, dtype="float32")
        assert all(parameter.numel() == 0 for parameter in policy.parameters()), "the weights are not sharded"
        Path(target).mkdir(exist_ok=True)
        save_policy(policy, Path(target), gathered=deepspeed.zero.GatheredParameters, write=rank == 0)
    del keep


if __name__ == "__main__":
    main()
