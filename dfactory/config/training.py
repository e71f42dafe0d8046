"""Recipe keys: optimiser, schedule, batch, checkpoints, logging and evaluation."""

from dataclasses import dataclass
from typing import Any, Optional

from dfactory.config.keys import REQUIRED, key

TRACKERS = {
    "aim": "aim",
    "clearml": "clearml",
    "comet_ml": "comet-ml",
    "dvclive": "dvclive",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}
"""accelerate's trackers: the module, which is also the name in `report_to`, and what pip installs for it."""


@dataclass
class TrainingKeys:
    output_dir: str = key(REQUIRED, "run folder")
    overwrite_output_dir: bool = key(False, "start again in a folder that holds checkpoints, which are removed")
    seed: int = key(42, "seed of noise, order and random weights", low=0)

    optim: str = key(
        "adamw",
        "the optimiser: torch's AdamW, fused; bitsandbytes' AdamW with 8-bit moments; torch's Adafactor, without ZeRO; or "
        "DeepSpeed's Muon for hidden matrices with AdamW for the rest, with ZeRO (docs/training.md)",
        choices=("adamw", "adamw_8bit", "adafactor", "muon"),
    )
    learning_rate: float = key(1e-5, "peak learning rate", low=0.0)
    embedding_learning_rate: Optional[float] = key(
        None, "peak learning rate of embedding and head; null: learning_rate", low=0.0
    )
    muon_learning_rate: Optional[float] = key(
        None, "with optim muon, peak learning rate of hidden matrices, such as 0.02; null: learning_rate", low=0.0
    )
    lr_scheduler_type: str = key(
        "cosine", "shape of the learning rate after the warmup", choices=("cosine", "linear", "constant")
    )
    lr_min: float = key(0.0, "learning rate of the last step with cosine and linear; 0 is reached after it", low=0.0)
    warmup_steps: float = key(0, "linear warmup from 0; below 1: as a share of the run's steps", low=0)
    weight_decay: float = key(0.0, "decoupled weight decay, of matrices only", low=0.0)
    adam_beta1: float = key(0.9, "AdamW's decay of the gradient's mean", low=0.0, high=1.0)
    adam_beta2: float = key(0.999, "AdamW's decay of the squared gradient's mean", low=0.0, high=1.0)
    adam_epsilon: float = key(1e-8, "AdamW's term in the denominator", low=0.0)
    max_grad_norm: float = key(1.0, "clip the global gradient norm; 0: off", low=0.0)
    embedding_max_grad_norm: Optional[float] = key(
        None,
        "before that, clip the norm of the gradients of embedding and head together; null: not apart from the others",
        low=1e-6,
    )
    skip_nonfinite: int = key(
        0, "how many steps with a NaN or Inf in loss or gradient a run may skip; one more stops it", low=0
    )

    frozen_parameters: list[str] = key(
        [],
        "regular expressions; weights are not trained whose name one of them finds, as transformers has it: embed_tokens",
    )
    ema_decay: Optional[float] = key(
        None,
        "keep a moving average of the weights in fp32, w = ema_decay w + (1 - ema_decay) weights at each step; it is what "
        "is evaluated and saved, while training goes on with the weights; null: none",
        low=0.0,
        high=1.0,
    )

    num_train_epochs: float = key(1.0, "passes over the data, if max_steps is null", low=0.0)
    max_steps: Optional[int] = key(None, "optimiser steps; null: by num_train_epochs", low=1)
    per_device_train_batch_size: int = key(1, "packed sequences in a micro-batch", low=1)
    gradient_accumulation_steps: int = key(1, "micro-batches of a rank in one optimiser step", low=1)
    gradient_accumulation_tokens: Optional[int] = key(
        None,
        "instead: an optimiser step takes packed sequences until their records have so many response tokens or more, on all "
        "ranks together; so steps learn from equally much, on any number of ranks; null: by gradient_accumulation_steps",
        low=1,
    )

    save_strategy: str = key(
        "steps",
        "when to save before the last step, which is always saved: every save_steps, at the end of each epoch, after each "
        "evaluation that is the best so far, or never",
        choices=("no", "steps", "epoch", "best"),
    )
    save_steps: Optional[int] = key(
        None, "with save_strategy steps: steps between checkpoints; null: only the last step", low=1
    )
    save_total_limit: Optional[int] = key(
        None,
        "how many of the newest checkpoints to keep, and also the best by metric_for_best_model; null: all",
        low=1,
    )
    metric_for_best_model: Optional[str] = key(
        "eval/loss",
        "the metric of metrics.jsonl by which save_total_limit keeps the best checkpoint, load_best_model_at_end takes it, "
        "and early stopping counts; checkpoints without a value at their step do not count; null: only the newest are kept",
    )
    greater_is_better: Optional[bool] = key(
        None, "whether larger values of that metric are better; null: yes, except for a loss, nll or perplexity"
    )
    load_best_model_at_end: bool = key(
        False,
        "at the end BEST names the best checkpoint, which is then the model that the run folder stands for; it changes "
        "nothing of how the run is resumed",
    )
    early_stopping_patience: Optional[int] = key(
        None,
        "end the run after so many evaluations in a row without a better metric_for_best_model; null: never",
        low=1,
    )
    early_stopping_threshold: float = key(
        0.0, "with early_stopping_patience: by how much the metric has to be better than the best before", low=0.0
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
    report_to: list[str] = key([], f"trackers besides metrics.jsonl, one or several of {', '.join(TRACKERS)}")
    run_name: Optional[str] = key(None, "name for the trackers; null: the folder's")
    project: str = key("dfactory", "where trackers put the run beside others")
    tracker_options: dict[str, Any] = key(
        {}, "further options of a tracker as its own library calls them: {wandb: {entity: us, mode: offline}}"
    )
    profile_steps: Optional[list[int]] = key(
        None,
        "[first, last]: record these steps, counted from 1, on the first rank: a torch trace, seconds and memory by "
        "operator, and on a GPU a snapshot of its memory, into profile/ of the run folder; null: none",
    )
    device_tflops: Optional[float] = key(
        None,
        "peak of a device in `dtype`, TFLOP/s, that the metric mfu is a share of; null: the data sheet's of known GPUs in "
        "bfloat16, else no mfu",
        low=0.001,
    )

    callbacks: list[Any] = key(
        [],
        "code of one's own that is called after steps, evaluations and checkpoints (dfactory/runs/callbacks.py): "
        "`file.py:Class` relative to the recipe, a dotted path, or a mapping {name: one of these, ...options}",
    )

    eval_strategy: str = key(
        "steps",
        "when to evaluate besides the end of the run: every eval_steps, or at the end of each epoch; no: not even then",
        choices=("no", "steps", "epoch"),
    )
    eval_steps: Optional[int] = key(
        None, "with eval_strategy steps: steps between evaluations; null: only at the end", low=1
    )
    eval_on_start: bool = key(False, "evaluate before the first step, as step 0")
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
