"""A run whose records are read while it trains: the same losses, also behind a checkpoint."""

import json

import pytest

from dfactory.cli import main
from tests.test_assets import DATA


@pytest.mark.slow
def test_a_streamed_run_trains_what_the_other_trains_and_resumes(tmp_path, capsys):
    keys = ["model_name_or_path=tiny", "eval_datasets=[]", "eval_steps=null", "warmup_steps=0", "logging_steps=1"]
    keys += ["lr_scheduler_type=constant"]  # the length of the run must not matter

    def train(folder, *further):
        assert main(["train", str(DATA.parent / "sft.yaml"), *keys, f"output_dir={tmp_path / folder}", *further]) == 0
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        return [row["loss"] for row in map(json.loads, lines) if "loss" in row]

    expected = train("whole", "max_steps=4", "save_steps=null")
    assert train("streamed", "streaming=true", "max_steps=2", "save_steps=2") == expected[:2]
    assert "lines of 1 file(s), read while training goes on" in capsys.readouterr().out
    assert train("streamed", "streaming=true", "max_steps=4", "resume_from_checkpoint=true") == expected

    assert main(["train", str(DATA.parent / "sft.yaml"), *keys, "streaming=true", "max_steps=null"]) == 2
    assert "set max_steps" in capsys.readouterr().err
