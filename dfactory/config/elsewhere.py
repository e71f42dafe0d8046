"""Names that other frameworks have for keys of a recipe, and values by which they say "nothing": what both mean here."""

from collections.abc import Container, Mapping
from typing import Any

TRL = {
    "max_seq_length": "max_length",
    "max_prompt_length": "max_length",
    "max_completion_length": "decode.max_new_tokens",
    "temperature": "decode.temperature",
    "top_k": "decode.top_k",
    "top_p": "decode.top_p",
    "warmup_ratio": "warmup_steps",
    "dataset_name": "datasets",
    "train_dataset": "datasets",
    "eval_dataset": "eval_datasets",
    "evaluation_strategy": "eval_strategy",
    "optimizer": "optim",
    "optimizer_type": "optim",
    "bf16": "dtype",
    "torch_dtype": "dtype",
    "peft_config": "use_peft",
    "steps_per_generation": "num_iterations",
    "generation_batch_size": "prompts_per_step",
    "vllm_importance_sampling_clip_max": "importance_cap",
    "importance_sampling_level": "ratio_normalisation",
    "precompute_ref_log_probs": "reference",
    "ref_model": "reference",
    "num_train_steps": "max_steps",
}

LLAMA_FACTORY = {
    "cutoff_len": "max_length",
    "dataset": "datasets",
    "dataset_dir": "datasets",
    "finetuning_type": "use_peft",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "template": "chat_template_path",
    "pref_beta": "beta",
    "pref_loss": "loss_type",
    "pref_ftx": "sft_loss_coef",
    "flash_attn": "attn_implementation",
    "enable_liger_kernel": "use_liger_kernel",
    "val_size": "eval_datasets",
    "train_on_prompt": "chat_template_path",
    "mix_strategy": "datasets",
    "num_samples": "max_steps",
}

COMMON = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "global_batch_size": "gradient_accumulation_steps",
    "grad_accum": "gradient_accumulation_steps",
    "model": "model_name_or_path",
    "model_path": "model_name_or_path",
    "revision": "model_revision",
    "block_length": "block_size",
    "gen_length": "decode.max_new_tokens",
    "mask_id": "mask_token_id",
    "mask_ratio": "noise_range_high",
    "wandb": "report_to",
    "output": "output_dir",
    "logging_dir": "output_dir",
}

DLLM = {
    "dataset_args": "datasets",
    "lora": "use_peft",
    "time_epsilon": "noise_range_low",
    "loss_weight_type": "loss_weight",
    "loss_norm_type": "loss_weight",
    "mask_prompt_loss": "chat_template_path",
    "group_by_length": "packing",
    "canvas_length": "block_size",
    "max_new_tokens": "decode.max_new_tokens",
    "remasking": "decode.rule",
    "stochastic_transfer": "decode.rule",
}

DLLM_RL = {
    "pretrained_model": "model_name_or_path",
    "num_task_per_step": "prompts_per_step",
    "num_response_per_task": "num_generations",
    "max_token": "decode.max_new_tokens",
    "denoising_steps_per_block": "decode.steps",
    "remasking_strategy": "decode.rule",
    "dynamic_threshold": "decode.threshold",
    "shrink": "trace_stride",
    "mixed_precision": "dtype",
    "optimization_data": "datasets",
    "tensor_parallel_size": "num_rollout_workers",
}

LLADA = {  # generate.py's, and Dream's and Fast-dLLM v2's beside it
    "logits_eos_inf": "decode.min_new_tokens",
    "confidence_eos_eot_inf": "decode.defer_eos",
    "alg": "decode.rule",
    "small_block_length": "decode.sub_block_size",
}

DARE = {  # verl's words
    "train_files": "datasets",
    "val_files": "eval_datasets",
    "train_batch_size": "prompts_per_step",
    "ppo_mini_batch_size": "gradient_accumulation_steps",
    "ppo_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "max_response_length": "decode.max_new_tokens",
    "n": "num_generations",
    "mc_num": "num_views",
    "adv_estimator": "advantage_baseline",
    "kl_loss_coef": "kl_coef",
    "kl_loss_type": "kl_estimator",
    "clip_ratio": "epsilon",
    "clip_ratio_low": "epsilon",
    "clip_ratio_high": "epsilon_high",
    "loss_agg_mode": "loss_aggregation",
    "enable_gradient_checkpointing": "gradient_checkpointing",
    "ulysses_sequence_parallel_size": "row_length",
    "custom_reward_function": "reward_funcs",
    "total_epochs": "num_train_epochs",
    "save_freq": "save_steps",
    "test_freq": "eval_steps",
    "default_local_dir": "output_dir",
    "experiment_name": "run_name",
    "logger": "report_to",
}

AUTOMODEL = {
    "pretrained_model_name_or_path": "model_name_or_path",
    "path_or_dataset_id": "datasets",
    "seq_length": "max_length",
    "local_batch_size": "per_device_train_batch_size",
    "ckpt_every_steps": "save_steps",
    "val_every_steps": "eval_steps",
    "checkpoint_dir": "output_dir",
    "activation_checkpointing": "gradient_checkpointing",
    "ep_size": "expert_parallel_size",
    "supervise_padding": "eos_fill",
    "max_norm": "max_grad_norm",
    "min_lr": "lr_min",
    "lr_decay_style": "lr_scheduler_type",
    "lr_warmup_steps": "warmup_steps",
    "chat_template": "chat_template_path",
}

_ALL = AUTOMODEL | DARE | LLADA | DLLM_RL | DLLM | COMMON | LLAMA_FACTORY | TRL


def meant_by(name: str, known: Container[str]) -> str | None:
    """The key among `known` that another framework calls `name`."""
    bare = name.rpartition(".")[2]
    meant = _ALL.get(bare)
    return meant if meant in known else None


def meant_in(group: str, keys: Mapping[str, Any], known: Container[str]) -> list[tuple[str, str]]:
    """(dotted name, the key here) of what another framework's group of keys holds and is known here."""
    found = []
    for name, value in keys.items():
        dotted = f"{group}.{name}"
        if isinstance(value, Mapping):
            found += meant_in(dotted, value, known)
        elif here := (name if name in known else meant_by(name, known)):
            found.append((dotted, here))
    return found


# Bare key -> (values that say it elsewhere, the value here). Keys of `decode` are found under their own name.
NEUTRAL: dict[str, tuple[tuple[Any, ...], Any]] = {
    "max_steps": ((-1,), None),  # transformers: by num_train_epochs
    "save_total_limit": ((0, -1), None),
    "save_steps": ((0, -1), None),
    "eval_steps": ((0, -1), None),
    "row_length": ((0, -1), None),
    "max_grad_norm": ((None,), 0.0),
    "warmup_steps": ((None,), 0),
    "report_to": ((None, "none", ["none"]), []),
    "resume_from_checkpoint": ((None,), False),
    "datasets": ((None,), []),
    "eval_datasets": ((None,), []),
    "optim": (("adamw_torch", "adamw_torch_fused"), "adamw"),
    "lr_scheduler_type": (("constant_with_warmup",), "constant"),  # a shape after the warmup here
    "top_k": ((0, -1), None),  # transformers, vLLM
    "top_p": ((1,), None),
}
# Keys of other frameworks that are left out at the value that changes nothing.
NEUTRAL_KEYS: dict[str, tuple[Any, ...]] = {
    "warmup_ratio": (0, None),
    "min_p": (0, None),
    "typical_p": (1, None),
    "repetition_penalty": (1, None),
    "length_penalty": (1, None),
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "num_beams": (1, None),
}


def without_neutral(values: dict[str, Any], known: Container[str]) -> dict[str, Any]:
    """Keys and values with those that say "nothing" elsewhere put into the words of here; groups of keys too."""
    taken = {}
    for name, value in values.items():
        if isinstance(value, dict) and name == "decode":
            taken[name] = without_neutral(value, known)
        elif name in known or not _is_one_of(value, NEUTRAL_KEYS.get(name, ())):
            taken[name] = _here(name, value)
    return taken


def _here(name: str, value: Any) -> Any:
    if name == "report_to" and isinstance(value, str) and value != "none":
        return [value]
    elsewhere, here = NEUTRAL.get(name, ((), None))
    return here if _is_one_of(value, elsewhere) else value


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    """Numbers by value; true and false are no numbers."""
    return not isinstance(value, bool) and value in values
