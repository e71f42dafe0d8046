"""Rules between the keys of the optimiser, of frozen weights, of the moving average and of compiling."""

import re
from collections.abc import Iterator

from dfactory.config.training import TrainingKeys


def optimising_problems(keys: TrainingKeys) -> Iterator[str]:
    """`keys`: a whole recipe."""
    if keys.muon_learning_rate is not None and keys.optim != "muon":
        yield f"muon_learning_rate {keys.muon_learning_rate:g} with optim {keys.optim}: leave it out, or set optim to muon"
    for pattern in keys.frozen_parameters:
        try:
            re.compile(pattern)
        except re.error as problem:
            yield f"frozen_parameters {pattern!r} is no regular expression: {problem}"
    if keys.use_peft and keys.frozen_parameters:
        yield (
            "frozen_parameters with use_peft true: only adapters are trained there; choose them by lora_target_modules"
        )
    for name in ("embedding_learning_rate", "embedding_max_grad_norm"):
        if keys.use_peft and (value := getattr(keys, name)) is not None:
            yield (f"{name} {value:g} with use_peft true: adapters train neither embedding nor head; leave it out")
    yield from _compiling_problems(keys)
    if keys.expert_parallel_size > 1:
        for name, unset in (
            ("frozen_parameters", []),
            ("embedding_learning_rate", None),
            ("embedding_max_grad_norm", None),
            ("ema_decay", None),
        ):
            if (value := getattr(keys, name)) != unset:
                yield (
                    f"{name} {value} with expert_parallel_size {keys.expert_parallel_size}: ranks hold different experts, "
                    "which it does not know; leave it out, or use ZeRO 3 with expert_parallel_size 1"
                )


def _compiling_problems(keys: TrainingKeys) -> Iterator[str]:
    if not keys.torch_compile:
        if keys.torch_compile_mode is not None:
            yield f"torch_compile_mode {keys.torch_compile_mode} with torch_compile false: leave one of them out"
        return
    if keys.torch_compile_mode is not None and keys.torch_compile_backend != "inductor":
        yield (
            f"torch_compile_mode {keys.torch_compile_mode} with torch_compile_backend {keys.torch_compile_backend}: only "
            "inductor has modes; leave it out"
        )
    for name, unset, why in (
        ("use_peft", False, "adapters that are switched off and on would be compiled again each time"),
        ("activation_offloading", False, "it moves tensors that compiled code keeps for its backward pass"),
        ("expert_parallel_size", 1, "DeepSpeed exchanges the layers' experts for its own"),
    ):
        if (value := getattr(keys, name)) != unset:
            yield f"torch_compile true with {name} {str(value).lower()}: {why}; leave one of them out"
