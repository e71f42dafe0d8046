"""Names that other frameworks have for keys of a recipe: what an unknown key most likely means."""

from collections.abc import Container

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
    "eval_strategy": "eval_steps",
    "save_strategy": "save_steps",
    "bf16": "dtype",
    "torch_dtype": "dtype",
    "peft_config": "use_peft",
    "steps_per_generation": "num_iterations",
    "generation_batch_size": "prompts_per_step",
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
    "block_length": "block_size",
    "gen_length": "decode.max_new_tokens",
    "mask_id": "mask_token_id",
    "mask_ratio": "noise_range_high",
    "wandb": "report_to",
    "output": "output_dir",
    "logging_dir": "output_dir",
}


def meant_by(name: str, known: Container[str]) -> str | None:
    """The key among `known` that another framework calls `name`."""
    bare = name.rpartition(".")[2]
    meant = (COMMON | LLAMA_FACTORY | TRL).get(bare)
    return meant if meant in known else None
