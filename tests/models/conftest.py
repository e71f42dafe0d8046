"""Golden checkpoints, and tiny random models of the other families."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dfactory.models.registry import load_policy
from tests.batches import TINY_SIZES

GOLDEN_DIR = Path(__file__).parents[1] / "golden"

# About 30,000 parameters each; 96 tokens, grouped key/value heads.
SIZES = TINY_SIZES | {"tie_word_embeddings": False}
CONFIGS = {
    "qwen3": SIZES | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    "qwen3_moe": SIZES
    | {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
    },
    "llama": SIZES | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
}


@pytest.fixture(params=["llada2_tiny", "llada21_tiny"])
def golden(request):
    """A tiny checkpoint that the original code saved, and what that code computed from it."""
    directory = GOLDEN_DIR / request.param
    return SimpleNamespace(
        directory=directory,
        expected=json.loads((directory / "expected.json").read_text()),
        **load_file(directory / "forward.safetensors"),
    )


@pytest.fixture
def random_policy(tmp_path):
    """Make a random fp32 policy of a family, in its own directory with only a config.json."""

    def make(family: str, attn_implementation: str = "auto", **keys):
        directory = tmp_path / family
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(CONFIGS[family] | keys))
        policy = load_policy(
            directory, dtype="float32", init_weights="random", seed=1, attn_implementation=attn_implementation
        )
        with torch.no_grad():  # the initial 0.02 makes a model that hardly looks at its input
            for parameter in policy.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(5)
        return policy

    return make
