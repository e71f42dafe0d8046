"""Recipe keys: optimiser, schedule, batch, checkpoints, logging and evaluation."""

from dataclasses import dataclass
from typing import Any, Optional

from dfactory.config.keys import REQUIRED, key


@dataclass
class TrainingKeys:
    output_dir: str = key(REQUIRED, "run folder")
    overwrite_output_dir: bool = key(False, "start again in a folder that holds checkpoints, which are removed")
    seed: int = key(42, "seed of noise, order and random weights", low=0)

    learning_rate: float = key(1e-5, "peak learning rate", low=0.0)
    lr_scheduler_type: str = key(
        "cosine", "shape of the learning rate after the warmup", choices=("cosine", "linear", "constant")
    )
    lr_min: float = key(0.0, "learning rate of the last step with cosine and linear; 0 is reached after it", low=0.0)
    warmup_steps: float = key(0, "linear warmup from 0; below 1: as a share of the run's steps", low=0)
    weight_decay: float = key(0.0, "AdamW's weight decay, of matrices only", low=0.0)
    adam_beta1: float = key(0.9, "AdamW's decay of the gradient's mean", low=0.0, high=1.0)
    adam_beta2: float = key(0.999, "AdamW's decay of the squared gradient's mean", low=0.0, high=1.0)
    adam_epsilon: float = key(1e-8, "AdamW's term in the denominator", low=0.0)
    max_grad_norm: float = key(1.0, "clip the global gradient norm; 0: off", low=0.0)
    skip_nonfinite: int = key(
        0, "how many steps with a NaN or Inf in loss or gradient a run may skip; one more stops it", low=0
    )

    num_train_epochs: float = key(1.0, "passes over the data, if max_steps is null", low=0.0)
    max_steps: Optional[int] = key(None, "optimiser steps; null: by num_train_epochs", low=1)
    per_device_train_batch_size: int = key(1, "packed sequences in a micro-batch", low=1)
    gradient_accumulation_steps: int = key(1, "micro-batches of a rank in one optimiser step", low=1)

    save_steps: Optional[int] = key(None, "steps between checkpoints; null: only the last step", low=1)
    save_total_limit: Optional[int] = key(
        None,
        "how many of the newest checkpoints to keep, and also the best by metric_for_best_model; null: all",
        low=1,
    )
    metric_for_best_model: Optional[str] = key(
        "eval/loss",
        "the metric of metrics.jsonl by which save_total_limit keeps the best checkpoint; checkpoints without a value at "
        "their step do not count; null: only the newest are kept",
    )
    greater_is_better: Optional[bool] = key(
        None, "whether larger values of that metric are better; null: yes, except for a loss, nll or perplexity"
    )
    resume_from_checkpoint: Any = key(False, "true: the newest whole checkpoint of output_dir; or a path")
    first_loss_check: str = key(
        "warn",
        "what to do if weights were loaded and the first loss is that of guessing, log V; an autoregressive model has never "
        "seen a mask and is not checked",
        choices=("warn", "stop", "off"),
    )
    expert_coverage_steps: int = key(
        100, "steps between warnings about experts that no token was routed to; 0: no warnings", low=0
    )

    logging_steps: int = key(1, "steps between console lines; metrics.jsonl has every step", low=1)
    report_to: list[str] = key([], "trackers besides metrics.jsonl: wandb")
    run_name: Optional[str] = key(None, "name for the tracker; null: the folder's")

    eval_steps: Optional[int] = key(None, "steps between evaluations; null: only at the end", low=1)
    eval_noise_levels: list[float] = key([0.1, 0.3, 0.5, 0.7, 0.9], "the fixed grid of t for the evaluation loss")
    eval_decode_prompts: int = key(
        0,
        "first held-out prompts that are decoded at every evaluation, for tokens per forward and exact match; 0: none",
        low=0,
    )
    eval_answer_pattern: Optional[str] = key(
        None, "regular expression whose first group is a decoded response's answer; null: all of it is compared"
    )
    per_device_eval_batch_size: int = key(1, "packed sequences in an evaluation micro-batch", low=1)
