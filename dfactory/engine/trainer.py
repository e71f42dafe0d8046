"""One optimiser step on DeepSpeed: forward to scores, objective to sums, one division, backward, step.

DeepSpeed owns sharding, precision, clipping, the optimiser and its schedule. It does not know what is computed: it gets a
scalar per micro-batch, already divided by the counts of the global batch (see window.py).
"""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.utils import set_z3_leaf_modules
from torch import nn
from transformers.integrations import HfDeepSpeedConfig

from dfactory import distributed
from dfactory.engine import expert_parallel
from dfactory.engine.activations import kept_note, offloading, recompute
from dfactory.engine.average import Average
from dfactory.engine.clipping import clip_together
from dfactory.engine.compiling import compile_layers
from dfactory.engine.optimizers import clipped_apart, made_here, optimizer_section, parameter_groups, refuse_unsupported
from dfactory.engine.replay import replay
from dfactory.engine.schedule import learning_rate_schedule
from dfactory.engine.window import (
    MeanTracker,
    Measure,
    Objective,
    Source,
    mean_over_levels,
    micro_loss,
    spread_nonfinite,
    window_counts,
    with_gradient,
)
from dfactory.errors import ConfigError
from dfactory.models.policy import Policy
from dfactory.models.saving import layer_groups
from dfactory.phases import Phases
from dfactory.planning.memory import layers_kept, setup_of
from dfactory.recipe import Recipe
from dfactory.redaction import redacted
from dfactory.runs.precision import AUTO
from dfactory.types import Mean, TokenScores, ViewBatch


def deepspeed_config(recipe: Recipe) -> dict[str, Any]:
    """The recipe's DeepSpeed file merged with the recipe's own keys. Raises ConfigError where the two disagree."""
    config: dict[str, Any] = {}
    if recipe.deepspeed is not None:
        file = Path(recipe.deepspeed)
        if not file.is_file():
            raise ConfigError(f"deepspeed {file} does not exist: give a JSON file such as recipes/deepspeed/zero3.json")
        try:
            config = json.loads(file.read_text())
        except json.JSONDecodeError as problem:
            raise ConfigError(f"deepspeed {file}:{problem.lineno} is not JSON: {problem.msg}") from problem
    config = _merge(config, recipe.deepspeed_overrides)
    zero = config.get("zero_optimization", {})
    offloaded = "offload_optimizer" in zero and zero.get("stage", 0) > 0
    if zero.get("compute_grad_norm") is False:
        raise ConfigError(
            f"zero_optimization.compute_grad_norm false in {recipe.deepspeed}: "
            "steps with a NaN would be applied; leave it out"
        )
    if recipe.dtype == AUTO:
        raise ConfigError(
            f"dtype {AUTO} is settled when a run begins: take dfactory.runs.precision.settled(...).recipe(recipe)"
        )
    owned = {
        "train_micro_batch_size_per_gpu": recipe.per_device_train_batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps,
        "gradient_clipping": recipe.max_grad_norm,
        "bf16": {"enabled": recipe.dtype == "bfloat16", "check_grad_overflow": True},  # skip steps with a NaN
        **optimizer_section(recipe, offloaded=offloaded),
    }
    if recipe.expert_parallel_size > 1 or "expert_parallel" in config:
        owned["expert_parallel"] = expert_parallel.autoep_section(recipe)
    _refuse_conflicts(config, owned, recipe.deepspeed)
    config = _merge(config, owned)
    sharded = recipe.dtype == "bfloat16" or recipe.expert_parallel_size > 1
    zero = config.setdefault("zero_optimization", {"stage": int(sharded)})
    if recipe.dtype == "bfloat16" and zero.get("stage", 0) == 0:
        raise ConfigError(
            f"zero_optimization.stage 0 in {recipe.deepspeed} with dtype bfloat16 keeps no fp32 weights to add small steps "
            "to: use stage 1, or dtype float32"
        )
    if recipe.expert_parallel_size > 1 and zero.get("stage", 0) == 0:
        raise ConfigError(
            f"zero_optimization.stage 0 in {recipe.deepspeed} with expert_parallel_size {recipe.expert_parallel_size}: "
            "use stage 1, 2 or 3"
        )
    refuse_unsupported(recipe, zero.get("stage", 0), offloaded=offloaded)
    if recipe.torch_compile and zero.get("stage", 0) == 3:
        raise ConfigError(
            f"torch_compile true with zero_optimization.stage 3 in {recipe.deepspeed}: weights are fetched module by "
            "module, and each fetch is a break in the compiled graph; use stage 0, 1 or 2"
        )
    if recipe.embedding_max_grad_norm is not None and "offload_optimizer" in zero:
        raise ConfigError(
            f"embedding_max_grad_norm {recipe.embedding_max_grad_norm:g} with zero_optimization.offload_optimizer: "
            "DeepSpeed takes the norms on the host before gradients can be scaled; leave one of them out"
        )
    if recipe.ema_decay is not None and "offload_param" in zero:
        raise ConfigError(
            f"ema_decay {recipe.ema_decay:g} with zero_optimization.offload_param: the average is kept beside the weights "
            "on the device; leave one of them out"
        )
    if recipe.optim == "muon" and zero["stage"] == 3:
        zero.setdefault("reduce_scatter", False)  # a matrix is orthogonalised whole
    if recipe.dtype == "bfloat16":  # else a gradient would depend on how a batch is cut into micro-batches
        config.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    config.setdefault("steps_per_print", 10**9)  # metrics.jsonl has every step
    return config


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        inner = merged.get(name)
        merged[name] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def _refuse_conflicts(config: dict[str, Any], owned: dict[str, Any], file: str | None, prefix: str = "") -> None:
    for name, value in owned.items():
        if name not in config or config[name] in ("auto", value):
            continue
        if isinstance(value, dict) and isinstance(config[name], dict):
            _refuse_conflicts(config[name], value, file, f"{prefix}{name}.")
            continue
        raise ConfigError(
            f"{prefix}{name} {config[name]!r} in {file} against {value!r} by the recipe: leave it out there, or say auto"
        )


class Trainer:
    """A Policy under DeepSpeed. All ranks call the same methods in the same order."""

    def __init__(self, recipe: Recipe, policy: Policy, num_steps: int, *, load_universal: bool = False):
        self.recipe, self.policy = recipe, policy
        self.rank, self.world_size = distributed.start()
        self.device = distributed.device()
        self.phases = Phases(self.device)
        config = deepspeed_config(recipe)
        expert_parallel.check_ranks(recipe, self.world_size)
        if load_universal:
            config["checkpoint"] = {"load_universal": True}
        self.activations_note = ""
        if recipe.gradient_checkpointing:
            sizes = policy.model.config
            kept = layers_kept(sizes, setup_of(recipe, config, self.world_size))
            recompute(policy.model, kept)
            self.activations_note = kept_note(recipe, kept, sizes.num_hidden_layers)
        compiled = (recipe.torch_compile_backend, recipe.torch_compile_mode)
        self.compiling_note = compile_layers(policy, *compiled) if recipe.torch_compile else ""
        self.offloading = offloading() if recipe.activation_offloading else contextlib.nullcontext()
        moe_blocks = gather_moe_blocks_whole(policy)
        self.engine = start_engine(
            policy.train(),
            config,
            model_parameters=parameter_groups(policy, recipe),
            optimizer=made_here(recipe),
            lr_scheduler=lambda optimizer: learning_rate_schedule(recipe, optimizer, num_steps),
        )
        if recipe.expert_parallel_size > 1:
            expert_parallel.finish_layers(policy, moe_blocks)
        average = recipe.ema_decay is not None
        self.average = Average(policy.model, recipe.ema_decay, self.zero_stage) if average else None
        self.watch: Measure = lambda batch, scores: {}  # further metrics of a micro-batch
        self.clipped_apart = clipped_apart(policy, recipe)
        self.losses: list[torch.Tensor] = []  # each micro-batch's part of the last global batch's loss

    @property
    def zero_stage(self) -> int:
        return self.engine.zero_optimization_stage()

    @property
    def learning_rate(self) -> float:
        """Of the groups that have no rate of their own."""
        rates, first = self.engine.get_lr(), self.engine.lr_scheduler.base_lrs
        return next(
            (rate for rate, base in zip(rates, first, strict=True) if base == self.recipe.learning_rate), rates[0]
        )

    @contextlib.contextmanager
    def own_hyperparameters(self) -> Iterator[None]:
        """A context in which DeepSpeed may load a checkpoint. On exit learning rates, decay, betas, eps and clipping are
        those of the recipe again."""
        optimizer = self.engine.basic_optimizer
        own = [{name: v for name, v in group.items() if name != "params"} for group in optimizer.param_groups]
        yield
        for group, hyperparameters in zip(optimizer.param_groups, own, strict=True):
            group.update(hyperparameters)
        if self.zero_stage > 0:
            self.engine.optimizer.clip_grad = self.recipe.max_grad_norm

    def go_to(self, step: int) -> None:
        """Set the learning rate to that of the step after `step` finished ones. It depends on the step's number alone."""
        schedule = self.engine.lr_scheduler
        schedule.last_epoch, schedule._step_count = step - 1, step + 2  # torch warns if the count is 1
        schedule.step()

    def train_window(self, micro_batches: list[ViewBatch], objective: Objective) -> dict[str, float]:
        """One optimiser step over this rank's share of a global batch -> the metrics of the whole batch."""
        started = time.perf_counter()
        learning_rate = self.learning_rate
        moved = [batch.to(self.device) for batch in micro_batches]
        if objective.spans_micro_batches and len(moved) > 1:
            objective, moved = replay(objective, moved, [self.score(batch) for batch in moved])
        ahead = self._scores_ahead(moved, objective)
        counts = window_counts(objective, moved, ahead, distributed.all_reduce_sum)
        means, self.losses = MeanTracker(), []
        for number, (batch, scores) in enumerate(zip(moved, ahead, strict=True), start=1):
            self.engine.set_gradient_accumulation_boundary(number == len(moved))  # global batches may differ in length
            if scores is None or not scores.logprob_N.requires_grad:
                with self.offloading, self.phases("forward"):
                    scores = self.engine(with_gradient(batch, objective, counts, self.world_size))
            with self.phases("backward"):
                terms = objective(batch, scores)
                loss = micro_loss(terms, counts, self.world_size)
                self.engine.backward(spread_nonfinite(loss), scale_wrt_gas=False)
            with self.phases("optimizer"):
                norms = self._clip_ends()
                grad_norm = self._plain_grad_norm()
                self._step(grad_norm)
            share = len(micro_batches) * self.world_size  # the loss is already divided: its counts add up to 1
            self.losses.append(loss.detach() / self.world_size)
            means.add(
                {**terms.loss, **terms.metrics, **self.watch(batch, scores), "loss": Mean(self.losses[-1], 1 / share)}
            )
        if self.average is not None:
            with self.phases("optimizer"):
                self.average.update()
        sizes = torch.tensor([[batch.num_tokens, batch.num_targets] for batch in micro_batches]).sum(dim=0)
        distributed.all_reduce_sum(sizes)
        tokens, targets = sizes.tolist()
        metrics = means.reduce(distributed.all_reduce_sum)
        seconds = time.perf_counter() - started
        return metrics | {
            **{name: float(norm) for name, norm in norms.items()},
            "grad_norm": float(self.engine.get_global_grad_norm() or grad_norm),
            "learning_rate": learning_rate,
            "tokens": tokens,
            "targets": targets,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "ranks": self.world_size,
            **self.phases.taken(),
            **distributed.peak_memory(),
        }

    def _scores_ahead(self, micro_batches: list[ViewBatch], objective: Objective) -> list[TokenScores | None]:
        """The scores that the counts need: none, those of the only micro-batch, or those of all without gradient."""
        if not objective.counts_need_scores:
            return [None] * len(micro_batches)
        if len(micro_batches) == 1:
            with self.offloading, self.phases("forward"):
                return [self.engine(micro_batches[0])]
        return [self.score(batch) for batch in micro_batches]

    def score(self, batch: ViewBatch) -> TokenScores:
        """The current model's scores, without gradient and dropout. All ranks must call this together."""
        with self.phases("scoring"):
            return self._scores(batch)

    @torch.no_grad()
    def _scores(self, batch: ViewBatch) -> TokenScores:
        self.engine.eval()
        scores = self.engine(batch.to(self.device))
        self.engine.train()
        return scores

    def averaged(self) -> contextlib.AbstractContextManager:
        """A context in which the model has the moving average for weights, where the recipe keeps one."""
        return self.average.in_place() if self.average is not None else contextlib.nullcontext()

    def gathered(self, parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager:
        """A context in which these parameters are whole on this rank; under ZeRO-3 all ranks must enter it."""
        return deepspeed.zero.GatheredParameters(parameters) if self.zero_stage == 3 else contextlib.nullcontext()

    def weights(self) -> Iterator[dict[str, torch.Tensor]]:
        """The trained tensors, by their names in `policy.model`, one layer at a time; with LoRA the adapters only.

        All ranks must iterate over it together. A yielded tensor is valid until the next one is requested.
        """
        trainable = {name: p for name, p in self.policy.model.named_parameters() if p.requires_grad}
        groups = [list(trainable.items())] if self.recipe.use_peft else layer_groups(self.policy.model)
        for group in groups:
            with self.gathered([tensor for _, tensor in group if isinstance(tensor, nn.Parameter)]):
                yield {name: tensor.detach() for name, tensor in group}

    def _step(self, plain_grad_norm: torch.Tensor | float) -> None:
        """DeepSpeed's step. It changes no weight if the gradient's norm over all ranks is not finite.

        Sharded optimisers skip such a step themselves. Without ZeRO torch's fused AdamW skips it on the device, by the flag
        that GradScaler sets. The schedule always advances: a step's learning rate depends on its number alone.
        """
        if not self.engine.is_gradient_accumulation_boundary():
            return self.engine.step()
        if self.zero_stage == 0:
            self.engine.optimizer.found_inf = (~plain_grad_norm.isfinite()).float()
        self.engine.step()
        if not self.engine.was_step_applied():
            self.engine.lr_scheduler.step()

    def _clip_ends(self) -> dict[str, torch.Tensor]:
        """Clip the gradients of embedding and head by their own norm, where the recipe gives one and a global batch is
        complete. Returns that norm, as a metric."""
        if not self.clipped_apart or not self.engine.is_gradient_accumulation_boundary():
            return {}
        return {"embedding_grad_norm": clip_together(self.clipped_apart, self.recipe.embedding_max_grad_norm)}

    def _plain_grad_norm(self) -> torch.Tensor | float:
        """The norm of the gradient without ZeRO. DeepSpeed reports it for sharded gradients only; at this point plain ones
        are already averaged over the ranks."""
        if self.zero_stage > 0 or not self.engine.is_gradient_accumulation_boundary():
            return 0.0
        return torch.nn.utils.get_total_norm([p.grad for p in self.policy.parameters() if p.grad is not None])

    def evaluate(self, source: Source, measure: Measure) -> dict[str, float]:
        """Means over all micro-batches of a finite source and all ranks; metrics by mask ratio are averaged too."""
        means = MeanTracker()
        while (window := source.next_window()) is not None:
            for batch in window:
                moved = batch.to(self.device)
                means.add(measure(moved, self._scores(moved)))
        return mean_over_levels(means.reduce(distributed.all_reduce_sum))


def gather_moe_blocks_whole(policy: Policy) -> list[str]:
    """Make ZeRO-3 gather MoE blocks as a whole, because routing decides which of their children run. Returns their names."""
    blocks = {n: m for n, m in policy.named_modules() if type(m).__name__ in policy.family.moe_blocks}
    if blocks:
        set_z3_leaf_modules(policy, sorted({type(block) for block in blocks.values()}, key=str))
    return list(blocks)


def start_engine(policy: Policy, config: dict[str, Any], **options) -> deepspeed.DeepSpeedEngine:
    """deepspeed.initialize, with the policy's buffers moved to the engine's device.

    For a model that was read into ZeRO-3 shards DeepSpeed moves only the parameters, so that the routers' correction, a
    buffer, would stay on the CPU.
    """
    engine, *_ = deepspeed.initialize(model=policy, config=config, **options)
    engine.config = redacted(engine.config)  # DeepSpeed writes it into every checkpoint
    for buffer in policy.buffers():
        buffer.data = buffer.data.to(engine.device)
    whole = engine.zero_optimization_stage() == 0 or isinstance(engine.optimizer, BF16_Optimizer)
    if whole and engine.dp_world_size == 1:
        engine.enable_backward_allreduce = False  # with one rank it would only copy all gradients to a buffer and back
    return engine


def keep_zero3_config(recipe: Recipe) -> HfDeepSpeedConfig | None:
    """While the returned object lives, transformers loads checkpoints straight into ZeRO-3 shards.

    Only for checkpoints: random weights are drawn whole, so that every ZeRO stage starts from the same ones.
    """
    sharded = zero_stage(recipe) == 3 and recipe.init_weights == "pretrained"
    return HfDeepSpeedConfig(deepspeed_config(recipe)) if sharded else None


def zero_stage(recipe: Recipe) -> int:
    return deepspeed_config(recipe)["zero_optimization"].get("stage", 0)
