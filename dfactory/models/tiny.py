"""The embedded model: a LLaDA2-MoE of 1.3 million parameters, small enough to train on a CPU.

`TINY_DIR` is a whole model directory: config.json, tokenizer, chat template, and the weights in bfloat16 of a base that
recipes/quickstart/base.yaml pre-trained. `tiny_config` is the configuration of a much smaller model for tests. Both use
the key names of the original LLaDA2 checkpoints.
"""

import json
from pathlib import Path
from typing import Any

TINY_NAME = "tiny"  # what a recipe writes as model_name_or_path
TINY_DIR = Path(__file__).resolve().parent.parent / "assets" / "tiny"

# what makes a model for tests out of the embedded one
_TEST_SIZES = {
    "vocab_size": 160,
    "pad_token_id": 157,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "initializer_range": 0.02,
    "rope_theta": 600000,
    "torch_dtype": "float32",
}


def embedded_config() -> dict[str, Any]:
    """config.json of the embedded model."""
    return json.loads((TINY_DIR / "config.json").read_text(encoding="utf-8"))


def tiny_config(**overrides: Any) -> dict[str, Any]:
    """config.json of a LLaDA2-MoE for tests: two layers, eight experts, 160 tokens; 159 is free for the mask.

    Raises TypeError for a key that LLaDA2's configuration does not have.
    """
    config = embedded_config()
    unknown = sorted(set(overrides) - set(config))
    if unknown:
        raise TypeError(f"tiny_config has no key {', '.join(unknown)}; LLaDA2 keys are {', '.join(sorted(config))}")
    return config | _TEST_SIZES | overrides


def write_tiny_config(directory: Path, **overrides: Any) -> Path:
    """Write tiny_config's config.json into `directory` (made if missing) and return the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(tiny_config(**overrides), indent=2) + "\n", encoding="utf-8")
    return directory
