"""Recipe keys: which model, in which precision, trained fully or through LoRA."""

from dataclasses import dataclass
from typing import Any, Optional

from dfactory.config.keys import REQUIRED, key


@dataclass
class ModelKeys:
    model_name_or_path: str = key(
        REQUIRED,
        "directory of the checkpoint, name of a model on the hub (`org/name`), or `tiny` for the embedded model",
    )
    model_revision: Optional[str] = key(
        None, "branch, tag or commit of a model on the hub; null: its newest version, which may change"
    )
    init_weights: str = key(
        "pretrained",
        "load the weights, or draw random ones from `seed` for the directory's config.json",
        choices=("pretrained", "random"),
    )
    dtype: str = key(
        "bfloat16",
        "precision of weights and arithmetic; auto: bfloat16 on a GPU that has it, on a CPU the one that multiplies "
        "matrices faster, measured when the run begins; a resumed run keeps its checkpoint's",
        choices=("bfloat16", "float32", "auto"),
    )
    attn_implementation: str = key(
        "auto",
        "how the visibility rule is computed: flex on GPUs, segments on CPUs; dense is for tests",
        choices=("auto", "flex", "segments", "dense"),
    )
    gradient_checkpointing: bool = key(False, "recompute activations in the backward pass")
    activation_memory_gb: Optional[float] = key(
        None,
        "with gradient_checkpointing: as many of the last layers keep their activations as by the forecast fit into so "
        "many GB of a rank, the first ones recompute; null: all recompute",
        low=0.0,
    )
    activation_offloading: bool = key(
        False, "keep activations in host memory between forward and backward pass; needs CUDA"
    )
    torch_compile: bool = key(
        False, "train with compiled layers, all but the last, their attention and their experts (docs/training.md)"
    )
    torch_compile_backend: str = key(
        "inductor", "with torch_compile: what compiles; aot_eager is for tests", choices=("inductor", "aot_eager")
    )
    torch_compile_mode: Optional[str] = key(
        None,
        "with torch_compile and inductor: how long it looks for fast code; null: default. The modes that record CUDA graphs "
        "need one shape for ever, and are no choice",
        choices=("default", "max-autotune-no-cudagraphs"),
    )
    use_liger_kernel: bool = key(False, "norms and SwiGLU as Liger's fused kernels while training; needs CUDA")
    mask_token_id: Optional[int] = key(None, "id of [M]; null: from the tokenizer")
    mask_token: Optional[str] = key(
        None,
        "text of the token that becomes the mask of a model that knows none, or `auto`: a reserved token, else an unused "
        "row of the embedding, else a new row; saved with the model",
    )
    eos_token_id: Optional[int] = key(None, "id of EOS; null: from the tokenizer")
    token_ranges: dict[str, Any] = key(
        {},
        "ids of other modalities, {name: [first, one after the last]}: a target in a range is scored among the ids of that "
        "range alone, every other target among those of none; text holds them as <|name_0|>, <|name_1|>, ...; empty: as "
        "the model was trained",
    )
    logit_shift: Optional[int] = key(
        None,
        "where the logits of a token come from, for autoregressive models, which take either. 1: the hidden state to its "
        "left, as they were trained, so that what they know is there from the first step; 0: its own position. The "
        "checkpoint records it; null: as the model was trained, and 0 for an autoregressive one",
        low=0,
        high=1,
    )
    use_peft: bool = key(False, "train LoRA adapters instead of all weights")
    lora_r: int = key(16, "rank of the adapters", low=1)
    lora_alpha: int = key(32, "scale of the adapters: alpha / r", low=1)
    lora_dropout: float = key(0.0, "dropout before the adapters", low=0.0, high=0.99)
    lora_target_modules: list[str] = key(
        ["q_proj", "k_proj", "v_proj", "o_proj"], "module names (suffixes) that get adapters"
    )
    expert_parallel_size: int = key(
        1, "ranks that share the experts of a layer (DeepSpeed's AutoEP); divides both ranks and experts", low=1
    )
    deepspeed: Optional[str] = key(
        None, "DeepSpeed JSON, by path (relative to the recipe); null: ZeRO 1 in bfloat16, ZeRO 0 in float32"
    )
    deepspeed_overrides: dict[str, Any] = key({}, "DeepSpeed keys that override that file")

    @property
    def lora_options(self) -> dict[str, Any]:
        """The adapters' shape, as `models.adapters.add_adapters` takes it."""
        return {
            "r": self.lora_r,
            "alpha": self.lora_alpha,
            "dropout": self.lora_dropout,
            "target_modules": self.lora_target_modules,
        }
