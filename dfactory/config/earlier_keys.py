"""The keys of the earlier dFactory (sections `model`, `data`, `train`), and what becomes of each: tables, no logic.

The names and defaults are those of its tasks/train_llada2_bd.py and of the VeOmni arguments under it.
"""

from typing import Any, NamedTuple

RENAMED = {
    "model.model_path": "model_name_or_path",
    "data.max_seq_len": "max_length",
    "data.noise_range_low": "noise_range_low",
    "data.noise_range_high": "noise_range_high",
    "data.mask_token_id": "mask_token_id",
    "train.output_dir": "output_dir",
    "train.seed": "seed",
    "train.micro_batch_size": "per_device_train_batch_size",
    "train.num_train_epochs": "num_train_epochs",
    "train.max_steps": "max_steps",
    "train.lr": "learning_rate",
    "train.lr_min": "lr_min",
    "train.lr_decay_style": "lr_scheduler_type",
    "train.lr_warmup_ratio": "warmup_steps",
    "train.weight_decay": "weight_decay",
    "train.beta1": "adam_beta1",
    "train.beta2": "adam_beta2",
    "train.max_grad_norm": "max_grad_norm",
    "train.enable_gradient_checkpointing": "gradient_checkpointing",
    "train.enable_activation_offload": "activation_offloading",
    "train.expert_parallel_size": "expert_parallel_size",
    "train.block_size": "block_size",
    "train.log_steps": "logging_steps",
    "train.wandb_name": "run_name",
    "train.wandb_project": "project",
}

_LOADER = "records are read in one pass, packed and ordered by the seed; no loader has to be set up"
_WINDOW = "the last, incomplete window is trained on as well"
_DYNAMIC = "batches have a fixed number of rows"
_INIT = "DeepSpeed reads the weights straight into its shards"
LEFT_OUT = {
    "model.config_path": "config.json is read from model_name_or_path",
    "model.tokenizer_path": "the tokenizer is read from model_name_or_path",
    "model.moe_implementation": "experts always run grouped",
    "model.attn_implementation": "attn_implementation auto takes flex_attention on GPUs",
    "model.basic_modules": "MoE blocks are gathered whole",
    "data.dataloader_type": _LOADER,
    "data.datasets_type": _LOADER,
    "data.num_workers": _LOADER,
    "data.prefetch_factor": _LOADER,
    "data.pin_memory": _LOADER,
    "data.drop_last": _WINDOW,
    "data.train_size": _DYNAMIC,
    "data.dyn_bsz_buffer_size": _DYNAMIC,
    "train.dyn_bsz_buffer_size": _DYNAMIC,
    "train.dyn_bsz_margin": _DYNAMIC,
    "train.bsz_warmup_ratio": _DYNAMIC,
    "train.bsz_warmup_init_mbtoken": _DYNAMIC,
    "train.init_device": _INIT,
    "train.broadcast_model_weights_from_rank0": _INIT,
    "train.enable_forward_prefetch": "stage3_prefetch_bucket_size in deepspeed_overrides decides",
    "train.enable_reentrant": "checkpointing is never reentrant",
    "train.enable_full_determinism": "noise and order are pure functions of the seed",
    "train.empty_cache_steps": "the allocator is left alone",
    "train.gc_steps": "the garbage collector is left alone",
    "train.ckpt_manager": "DeepSpeed writes the checkpoints",
    "train.save_hf_weights": "each checkpoint is a directory that transformers loads",
}


class Only(NamedTuple):
    """A key whose other values cannot be had: the values that say what happens here anyway, and what to do else."""

    values: tuple[Any, ...]
    otherwise: str


_ONE = "parallelism of that kind is not supported: use ZeRO (deepspeed) and expert_parallel_size"
ONLY = {
    "data.data_type": Only(
        ("conversation", "tokenid"),
        "a record's columns tell its kind; for plain text use stage: cpt with records of text",
    ),
    "data.text_keys": Only(
        ("messages", "input_ids"), "columns have fixed names: rename the column to messages (or input_ids) in the file"
    ),
    "data.chat_template": Only(("default",), "use chat_template_path with a Jinja file"),
    "train.block_diffusion_mode": Only(
        (True,), "every row is [clean | views]: for diffusion over the whole document set block_size to max_length"
    ),
    "train.same_token_labels": Only(
        (True,), "a view's position predicts the token at its own place, never the next one"
    ),
    "train.rmpad": Only((False,), "use packing: true, which puts several documents into a row"),
    "train.rmpad_with_pos_ids": Only((False,), "use packing: true, which puts several documents into a row"),
    "train.dyn_bsz": Only((False,), "use packing: true with row_length"),
    "train.optimizer": Only(("adamw",), "AdamW is the only optimiser"),
    "train.lr_start": Only((0, None), "warmup starts from 0"),
    "train.lr_decay_ratio": Only((1, None), "the decay ends with the run: shorten it with max_steps"),
    "train.tensor_parallel_size": Only((1,), _ONE),
    "train.pipeline_parallel_size": Only((1,), _ONE),
    "train.context_parallel_size": Only((1,), _ONE),
    "train.ulysses_parallel_size": Only((1,), _ONE),
    "train.data_parallel_replicate_size": Only((1, -1), "ZeRO shards over all ranks"),
    "train.data_parallel_shard_size": Only((-1,), "ZeRO shards over all ranks"),
    "train.enable_compile": Only((False,), "flex_attention alone is compiled"),
    "train.enable_profiling": Only((False,), "metrics.jsonl has seconds and tokens a second of each step"),
    "train.train_architecture": Only(("full",), "use use_peft: true with lora_r"),
    "train.hf_save_steps": Only((0, None), "each checkpoint is a directory that transformers loads: use save_steps"),
    "train.hf_save_epochs": Only((0, None), "each checkpoint is a directory that transformers loads: use save_steps"),
}

IMPLIED = {
    "complementary": (False, "the earlier code makes one view of a document; true trains each token in one of two"),
    "noise_level": ("document", "the earlier code draws one mask ratio for a document"),
    "packing": (False, "the earlier code puts one document into a row; true wastes no positions"),
    "overlong": ("truncate", "the earlier code cuts long documents"),
    "gradient_checkpointing": (True, "default of the earlier code"),
    "learning_rate": (5e-5, "default of the earlier code"),
    "lr_scheduler_type": ("constant", "default of the earlier code"),
    "lr_min": (1e-7, "default of the earlier code"),
}

CONVERTED = {
    "data.train_path": "datasets, one for each path between commas",
    "data.eval_path": "eval_datasets, one for each path between commas",
    "train.global_batch_size": "gradient_accumulation_steps = it / (micro_batch_size x ranks)",
    "train.confidence_beta": "above 0: stage cap with that confidence_beta",
    "train.enable_mixed_precision": "dtype bfloat16, with fp32 weights in the optimiser, whichever it is",
    "train.data_parallel_mode": "with enable_full_shard and enable_fsdp_offload: deepspeed_overrides.zero_optimization",
    "train.enable_full_shard": "ZeRO 3; false: ZeRO 2; data_parallel_mode ddp: ZeRO 1",
    "train.enable_fsdp_offload": "offload_optimizer to the host",
    "train.save_steps": "save_steps; 0: null",
    "train.eval_steps": "eval_steps; 0: null",
    "train.save_epochs": "save_steps null (a checkpoint at the end), if that is what it says; else set save_steps",
    "train.eval_epochs": "eval_steps null (at the end), if that is what it says; else set eval_steps",
    "train.load_checkpoint_path": "resume_from_checkpoint; auto: true; empty: false",
    "train.use_wandb": "report_to: [wandb]",
}
