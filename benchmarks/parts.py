"""Where a training step's time goes: attention, experts, head, optimiser, engine, data, and how busy the multipliers are.

Identity functions of autograd stand at the entrance and exit of each part's modules, so that its forward and its backward
are both between two marks. On a GPU the device is waited for at each mark, which costs a little. What lies in no part is the
rest: embedding, norms, loss and whatever DeepSpeed does around the backward pass.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from benchmarks.workload import Ours
from dfactory.engine.window import Source
from dfactory.models.head import VocabularyHead
from dfactory.models.policy import Policy

EMULATED = 2e9  # operations a second below which a precision is emulated: a large product would take a minute


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """Seconds by part."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self.started: dict[str, float] = {}

    def start(self, part: str) -> None:
        self.started[part] = now()

    def stop(self, part: str) -> None:
        if part in self.started:
            self.seconds[part] += now() - self.started.pop(part)


class _Mark(torch.autograd.Function):
    """The identity, which tells when the backward pass comes by."""

    @staticmethod
    def forward(ctx, tensor, backward: Callable[[], None]):
        ctx.backward_mark = backward
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        ctx.backward_mark()
        return gradient, None


def watch(module: nn.Module, part: str, clock: Clock) -> None:
    """Count the module's forward and backward into `part`. Its output is a tensor, or a tuple that begins with one."""

    def enter(_, args, kwargs):
        args, kwargs = list(args), dict(kwargs)
        first = args[0] if args else kwargs["hidden_states"]
        if first.requires_grad:
            first = _Mark.apply(first, lambda: clock.stop(f"{part}, backward"))
        if args:
            args[0] = first
        else:
            kwargs["hidden_states"] = first
        clock.start(part)
        return tuple(args), kwargs

    def leave(_, args, output):
        clock.stop(part)
        first = output if isinstance(output, torch.Tensor) else output[0]
        if not first.requires_grad:
            return output
        first = _Mark.apply(first, lambda: clock.start(f"{part}, backward"))
        if isinstance(output, torch.Tensor):
            return first
        return type(output)(first, *output[1:]) if hasattr(output, "_fields") else (first, *output[1:])

    module.register_forward_pre_hook(enter, with_kwargs=True)
    module.register_forward_hook(leave)


def watch_policy(policy: Policy, clock: Clock) -> None:
    for name, module in policy.named_modules():
        last = name.rsplit(".", 1)[-1]
        if last == "self_attn":
            watch(module, "attention", clock)
        elif last == "mlp":
            watch(module, "experts", clock)
        elif isinstance(module, VocabularyHead):
            watch(module, "head", clock)


@register_flop_formula(torch.ops.aten._grouped_mm)
def _grouped_mm_flops(left_shape, right_shape, *args, out_shape=None, **kwargs) -> int:
    """[T, K] x [E, K, N] by groups of T; or [K, T] x [T, N] by groups of T -> [E, K, N]."""
    rows, inner = left_shape
    return 2 * rows * inner * right_shape[-1]


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def _attention_flops(query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs) -> int:
    """Two products of [queries, keys] a head, masked pairs included. torch counts this on GPUs only."""
    rows, heads, queries, size = query_shape
    return 2 * (2 * rows * heads * queries * key_shape[2] * size)


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _attention_backward_flops(gradient_shape, query_shape, key_shape, value_shape, *args, **kwargs) -> int:
    """The scores once more, and the gradients of values, scores, queries and keys: five products for two."""
    return 5 * _attention_flops(query_shape, key_shape, value_shape) // 2


class Profile(NamedTuple):
    seconds: dict[str, float]  # by part
    flops: int  # of matrix products and attention
    matmul_rate: float  # operations a second of a large product here

    def lines(self) -> list[str]:
        total = sum(self.seconds.values())
        shares = [f"{part:22s} {value:8.3f} s  {value / total:6.1%}" for part, value in self.seconds.items()]
        rate = self.flops / total
        return [
            *shares,
            f"{'step':22s} {total:8.3f} s",
            f"{self.flops / 1e9:,.0f} billion operations in matrix products: {rate / 1e9:,.0f} billion a second, "
            f"{rate / self.matmul_rate:.0%} of this machine's {self.matmul_rate / 1e9:,.0f}",
        ]


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int) -> float:
    """Of a square product; of one an eighth as wide where that is already slow, as bfloat16 is where a CPU emulates it."""
    rate = _square_rate(dtype, device, size // 8)
    return rate if rate < EMULATED else _square_rate(dtype, device, size)


def _square_rate(dtype: torch.dtype, device: torch.device, size: int) -> float:
    """The best of five."""
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    best = min(_seconds(lambda: left @ right) for _ in range(5))
    return 2 * size**3 / best


def _seconds(call: Callable[[], object]) -> float:
    started = now()
    call()
    return now() - started


def profile_step(side: Ours, source: Source, steps: int = 2) -> Profile:
    """Two steps warm up, the second of which counts operations; `steps` are timed."""
    side.step(source.next_window()[0], None)
    with FlopCounterMode(display=False) as counter:
        side.step(source.next_window()[0], None)
    clock, trainer = Clock(), side.trainer
    watch_policy(trainer.policy, clock)
    engine_step = trainer.engine.step

    def timed_step():
        clock.start("optimiser")
        engine_step()
        clock.stop("optimiser")

    trainer.engine.step = timed_step
    total = 0.0
    for _ in range(steps):
        clock.start("data")
        (batch,) = source.next_window()
        clock.stop("data")
        total += _seconds(lambda batch=batch: side.step(batch, None))
    seconds = {part: value / steps for part, value in sorted(clock.seconds.items())}
    seconds["engine and the rest"] = total / steps - sum(value for part, value in seconds.items() if part != "data")
    device = trainer.device
    size = 2048 if device.type == "cpu" else 8192
    return Profile(seconds, counter.get_total_flops(), matmul_rate(trainer.policy.model.dtype, device, size))
