"""How much work a step is, and how much room checkpoints take: the arithmetic of `dfactory check`.

Work of a step, in multiplications and additions: 2 a weight and token forward, 4 backward; 2 more where activations are
recomputed; without adapters' frozen weights 2 less. Weights are those that a token passes through, without the embedding,
the head at targets only; attention scores are not counted. [Kaplan et al., arXiv 2001.08361, 2.1]
"""

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from dfactory.planning.memory import ParameterCounts, forecast, setup_of
from dfactory.planning.steps import BlockPhase, rows_a_step
from dfactory.recipe import Recipe

IMPORTS_S = 4.0  # Python and libraries on an idle CPU core, where they had been imported before and could not be timed
ENGINE_S = 0.4  # model, DeepSpeed and run folder, measured with recipes/quickstart/sft.yaml
DISK_RATE = 1e9  # bytes a second, assumed
CPU_SHARE = 0.3  # of a CPU's rate of large products that a step reaches: benchmarks/LOG.md, Training step
PROBE_ROWS, PROBE_WIDTH = 512, 2048  # of the products that are timed, the width at most
PROBE_S = 0.05
GPU_RATE = 2e14  # FLOP a second, in bfloat16: assumed, half of what an H100 reaches in large matrix products


def step_flop(recipe: Recipe, config: PreTrainedConfig, counts: ParameterCounts, rows: BlockPhase) -> float:
    """Of one rank in one optimiser step, on rows like those of `rows`; of all ranks where steps are cut by tokens."""
    passes = 2 + (2 if recipe.use_peft else 4) + 2 * recipe.gradient_checkpointing
    if recipe.reference_kind in ("copy", "adapter"):
        passes += 2
    a_row = (counts.active - counts.vocabulary) * rows.tokens + config.vocab_size * config.hidden_size * rows.targets
    return passes * a_row * rows_a_step(recipe, rows, 1)


class Rate(NamedTuple):
    """FLOP a second."""

    wall_s: float
    cpu_s: float  # of the processor's, which count each thread


def matmul_rate(hidden_size: int, dtype: str) -> Rate:
    """Of this machine's CPU, by products of activations with a weight of the model's width, for a twentieth of a second."""
    width = min(hidden_size, PROBE_WIDTH)
    hidden = torch.ones(PROBE_ROWS, width, dtype=getattr(torch, dtype))
    weight = torch.ones(width, 4 * width, dtype=hidden.dtype)
    for rows in (PROBE_ROWS >> halvings for halvings in range(5, -1, -1)):  # the first ones make threads and kernels
        if _seconds(hidden[:rows], weight) > PROBE_S:
            hidden = hidden[:rows]  # enough: where bfloat16 is emulated, all of them would take minutes
            break
    flop, wall, cpu = 0, time.perf_counter(), time.process_time()
    while flop == 0 or time.perf_counter() - wall < PROBE_S:
        torch.mm(hidden, weight)
        flop += 2 * hidden.numel() * weight.shape[1]
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Rate(flop / wall, flop / max(cpu, 1e-6))


def _seconds(hidden: torch.Tensor, weight: torch.Tensor) -> float:
    started = time.perf_counter()
    torch.mm(hidden, weight)
    return time.perf_counter() - started


class Checkpoints(NamedTuple):
    """What the checkpoints of a run take on disk, in bytes."""

    each: int
    weights: int  # of each
    written: int  # over the run
    kept: int  # at most, at a time

    @property
    def room(self) -> int:
        return self.kept * self.each


def checkpoints_of(
    recipe: Recipe, path: Path, deepspeed: dict[str, Any], trained: int, steps: int | None, new_rows: int = 0
) -> Checkpoints:
    """Trained weights twice, for readers and for the engine, and the optimiser's state; then of all that is kept."""
    lines = forecast(path, setup_of(recipe, deepspeed, 1, new_rows)).lines
    optimiser = next(line.bytes for line in lines if line.name == "optimiser")
    weights = trained * {"bfloat16": 2, "float32": 4}[recipe.dtype]
    saved = _saves(recipe, steps)
    limit = max(recipe.save_total_limit or saved, 1 + (recipe.metric_for_best_model is not None))
    return Checkpoints(
        2 * weights + optimiser, weights, saved, min(saved, limit + 1)
    )  # a new one comes before one goes


def _saves(recipe: Recipe, steps: int | None) -> int:
    """Checkpoints of a run of so many steps; at most, where evaluations decide."""
    if recipe.save_strategy == "epoch":
        return 1 + (math.ceil(recipe.num_train_epochs) if recipe.max_steps is None else 0)
    every = {"steps": recipe.save_steps, "best": recipe.eval_steps}.get(recipe.save_strategy)
    return math.ceil(steps / every) if steps and every else 1
