"""The files that SGLang serves an export with: thresholds of the recipe, what SGLang does not have is refused by name.

SGLang itself needs a GPU. Where it is installed, its own algorithms say which keys they read.
"""

import inspect
import json
import subprocess
from pathlib import Path

import pytest
import yaml

from dfactory.cli import main
from dfactory.commands.sglang import NOT_RUN, decode_keys_of, write_sglang
from dfactory.decoding.keys import DecodeKeys, rule_of
from dfactory.errors import ConfigError
from dfactory.models.families.base import FAMILIES
from dfactory.models.saving import carried_files
from dfactory.models.tiny import write_tiny_config
from dfactory.runs.lineage import HUB, Base, Lineage, Source, Training

ROOT = Path(__file__).resolve().parents[2]
LLADA2 = FAMILIES["llada2"].variants[0].in_sglang


def lineage(keys: dict | None = None, **decode) -> Lineage:
    """Of one training with these decode keys in its recipe."""
    recipe = yaml.safe_dump({"decode": decode} | (keys or {}))
    return Lineage(Base(HUB, "base"), (Training("sft", "run", Source("base"), recipe, 3),))


def test_thresholds_of_the_recipe():
    cases = [
        ({}, "LowConfidence", {"threshold": 0.95}),
        ({"threshold": 0.8, "max_new_tokens": 64}, "LowConfidence", {"threshold": 0.8}),
        (
            {"threshold": 0.7, "editing_threshold": 0.5, "max_post_steps": 4},
            "JointThreshold",
            {"threshold": 0.7, "edit_threshold": 0.5, "max_post_edit_steps": 4},
        ),
    ]
    for decode, algorithm, config in cases:
        keys = decode_keys_of(lineage(**decode))
        served = rule_of(keys).in_sglang(keys.editing_threshold, keys.max_post_steps)
        assert (served.algorithm, served.config) == (algorithm, config)
    assert decode_keys_of(Lineage(Base(HUB, "base"))) == DecodeKeys()


def test_the_renoising_rule_of_diffusion_gemma():
    keys = decode_keys_of(lineage(rule="renoise", entropy_bound=0.2, denoising_steps=24))
    served = rule_of(keys).in_sglang(None, 16)
    assert served.algorithm == "Gemma4Renoise"
    assert served.config["max_denoising_steps"] == 24
    assert served.config["sampler_config"] == {"entropy_bound": 0.2}


@pytest.mark.parametrize("decode", [{"steps": 4}, {"min_commit": 2}, {"rule": "left_to_right"}])
def test_rules_that_sglang_does_not_have(decode):
    keys = decode_keys_of(lineage(**decode))
    assert rule_of(keys).in_sglang(keys.editing_threshold, keys.max_post_steps) is None


def test_an_architecture_that_sglang_does_not_have(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ConfigError, match=r"no diffusion model of the architecture LlamaForCausalLM.*dfactory serve"):
        write_sglang(tmp_path, lineage())


def test_another_mask_is_refused_and_leaves_no_files(tmp_path, capsys):
    words = ["export", "--model", "tiny", "--output", str(tmp_path / "out"), "--sglang"]
    assert main(words) == 2
    assert f"takes {LLADA2.mask} for the mask of {LLADA2.architecture}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_files_parse_and_say_that_they_were_not_run(tmp_path):
    """Of a model with LLaDA2's own ids, of which no weights are needed here."""
    model = write_tiny_config(tmp_path / "model", vocab_size=157184, pad_token_id=156892)
    ids = {"mask_token_id": LLADA2.mask, "eos_token_id": 156892}
    told = write_sglang(model, lineage(ids, threshold=0.8))
    assert told == "SGLang: sglang.sh with LowConfidence (threshold 0.8, block_size 32), not run here"
    assert yaml.safe_load((model / "sglang.yaml").read_text()) == {"threshold": 0.8, "block_size": 32}
    assert subprocess.run(["sh", "-n", model / "sglang.sh"]).returncode == 0
    launch = (model / "sglang.sh").read_text()
    assert "--dllm-algorithm LowConfidence --dllm-algorithm-config" in launch
    assert NOT_RUN in launch
    assert NOT_RUN in (model / "sglang.yaml").read_text()
    assert not {file.name for file in carried_files(model)} & {"sglang.yaml", "sglang.sh"}  # of the next export


def test_a_renoising_model_takes_its_canvas_from_its_config(tmp_path):
    (tmp_path / "config.json").write_text((ROOT / "tests/golden/families/diffusion_gemma/config.json").read_text())
    told = write_sglang(tmp_path, lineage(rule="renoise"))
    assert "Gemma4Renoise" in told
    assert "block_size" not in yaml.safe_load((tmp_path / "sglang.yaml").read_text())


def test_sglang_reads_these_keys():
    """Of its algorithms' sources, because importing them needs a GPU's packages."""
    pytest.importorskip("sglang", reason="sglang is not installed; it needs a GPU")
    from sglang.srt.dllm.algorithm import low_confidence

    assert '"threshold"' in inspect.getsource(low_confidence)
