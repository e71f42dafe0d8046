"""What a resumed run does with a key of its recipe that has changed since the checkpoint: one table.

Every key of a recipe is in exactly one of the four parts, or an algorithm's, which a test holds; recipes/README.md shows the
table.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from dfactory.errors import ConfigError

THIS_START = frozenset({"output_dir", "overwrite_output_dir", "resume_from_checkpoint"})
"""Keys about the start itself, not about what is trained: they are not compared."""

KEPT = {
    "stage": "cursor, views and optimiser belong to the former stage",
    "seed": "noise and the order of the records are drawn from it",
    "mixing_temperature": "how often an epoch sees each record follows it",
    "curriculum": "the order of the first epoch follows it",
    "streaming": "the cursor counts lines with it, and records without it",
    "model_name_or_path": "the tokenizer, the base of adapters and a reference are read from it",
    "model_revision": "the tokenizer, the base of adapters and a reference are read from it",
    "init_weights": "the model that the run started from would be another",
    "dtype": "the optimiser's state is stored by it",
    "mask_token_id": "the model has learnt to fill the former id",
    "mask_token": "the model has learnt to fill the former token",
    "eos_token_id": "the model has learnt to end with the former id",
    "token_ranges": "the model has learnt to score the former ranges apart",
    "logit_shift": "the model has learnt to predict from the former position",
    "use_peft": "the stored weights are those of adapters, or of the whole model",
    "lora_r": "the stored adapters have the former shape",
    "lora_alpha": "the stored adapters were learnt at the former scale",
    "lora_target_modules": "the stored adapters belong to the former modules",
    "optim": "the optimiser's state is that of the former one",
    "embedding_learning_rate": "the optimiser's state is stored by groups of parameters, which it makes",
    "frozen_parameters": "the optimiser's state has the former parameters",
    "expert_parallel_size": "the stored experts are cut by it",
}
"""Keys that have to stay as they were, each with what a change would break: it is refused."""

SAME_RECORDS = "as long as every record stays the same to the last token: a checksum is compared (except in stage rl)"
LIMITED = {
    "datasets": "paths may change; records, their order and weights may not: a checksum is compared (except in stage rl)",
    "max_length": SAME_RECORDS,
    "overlong": SAME_RECORDS,
    "on_bad_row": SAME_RECORDS,
    "max_bad_fraction": SAME_RECORDS,
    "chat_template_path": SAME_RECORDS,
    "view_source": SAME_RECORDS,
    "trace_filter": SAME_RECORDS,
    "deepspeed": "as long as zero_optimization.stage stays",
    "deepspeed_overrides": "as long as zero_optimization.stage stays",
    "max_steps": "not below the steps that are done",
    "reference": "but a precomputed one is compared with what its scores were computed from, noise keys included",
    "reference_path": "but it is compared with what its scores were computed from, noise keys included",
}
"""Keys that apply from the next step on within a limit; who finds it broken raises an error that names it."""

APPLIED_BY_TOPIC = {
    "optimiser, schedule, steps, batch": """learning_rate muon_learning_rate ema_decay
    lr_scheduler_type lr_min warmup_steps weight_decay adam_beta1
    adam_beta2 adam_epsilon max_grad_norm embedding_max_grad_norm skip_nonfinite num_train_epochs per_device_train_batch_size
    gradient_accumulation_steps gradient_accumulation_tokens""",
    "saving, logging, evaluation, checks": """save_strategy save_steps save_total_limit metric_for_best_model
    greater_is_better load_best_model_at_end early_stopping_patience early_stopping_threshold
    first_loss_check expert_coverage_steps logging_steps report_to run_name project tracker_options callbacks
    profile_steps device_tflops
    eval_strategy eval_steps eval_on_start eval_datasets eval_noise_levels
    eval_decode_prompts eval_answer_pattern per_device_eval_batch_size""",
    "how it is computed": """attn_implementation gradient_checkpointing activation_memory_gb activation_offloading
    torch_compile torch_compile_backend torch_compile_mode use_liger_kernel lora_dropout""",
    "rows, noise, editing": """row_length packing block_size eos_fill block_size_schedule noise_range_low
    noise_range_high noise_level self_conditioning after_answer num_views complementary mask_embedding_noise
    mask_embedding_noise_steps neftune_noise_alpha stratified mask_count trace_stride edit_share edit_source keep_share
    num_turns draft_share draft_threshold""",
    "what is optimised, where the stage stays": "policy_loss",
    "decoding": "decode.*",
}
APPLIED = frozenset(name for names in APPLIED_BY_TOPIC.values() for name in names.split())
"""Keys that apply from the next step on, as if the run had had them from there. So do those of algorithms (algorithms/) that
are in no other part."""


class Change(NamedTuple):
    """A key that a resumed run has otherwise than its checkpoint."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} {_text(self.before)} -> {_text(self.now)}"


def changes_between(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Of two resolved recipes, as plain nested mappings. Keys that only one of them knows are another version's."""
    before, now = _dotted(before), _dotted(now)
    shared = [name for name in now if name in before and name not in THIS_START]
    return [Change(name, before[name], now[name]) for name in shared if before[name] != now[name]]


def refuse_kept(changes: list[Change], checkpoint: Any) -> None:
    """Raise ConfigError where a key changed that has to stay."""
    if kept := [change for change in changes if change.key in KEPT]:
        told = "; ".join(f"{change}: {KEPT[change.key]}" for change in kept)
        raise ConfigError(
            f"resuming from {checkpoint} cannot change {told}. Resume with the former value, or start a new run from its "
            "weights with model_name_or_path and another output_dir"
        )


def resume_table(of_algorithms: Collection[str]) -> str:
    """The table of recipes/README.md. `of_algorithms`: the keys of all algorithms."""
    applied = [name for name in of_algorithms if name not in KEPT.keys() | LIMITED.keys()]
    rows = [(sorted(THIS_START), "not compared: they are about the start itself")]
    rows += [(names.split(), f"{topic}: applied from the next step on") for topic, names in APPLIED_BY_TOPIC.items()]
    rows.append((applied, "keys of algorithms: applied from the next step on"))
    rows += [([name], f"applied, {limit}") for name, limit in LIMITED.items()]
    rows += [([name], f"refused: {broken}") for name, broken in KEPT.items()]
    lines = [f"| {', '.join(f'`{name}`' for name in names)} | {what} |" for names, what in rows]
    return "\n".join(["| key | changed on resuming |", "|---|---|", *lines])


def _dotted(keys: Mapping[str, Any]) -> dict[str, Any]:
    """`decode` is a group of keys; other mappings are values."""
    groups = {"decode"}
    flat = {name: value for name, value in keys.items() if name not in groups}
    return flat | {f"{group}.{name}": value for group in groups for name, value in keys.get(group, {}).items()}


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
