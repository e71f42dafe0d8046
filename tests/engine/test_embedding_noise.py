"""Noise on mask embeddings in real runs: however they are split, sharded, checkpointed or resumed, the same losses."""

import pytest
import torch

from tests.engine.conftest import read_metrics
from tests.engine.test_equality import ZERO

KEYS = ["mask_embedding_noise=0.2", "mask_embedding_noise_steps=2", "max_steps=3", "warmup_steps=0"]


@pytest.mark.slow
def test_the_same_losses_however_it_runs(recipe_file, run_jobs, tmp_path):
    def job(name: str, rows: int, accumulation: int, *keys: str) -> tuple:
        split = [f"per_device_train_batch_size={rows}", f"gradient_accumulation_steps={accumulation}"]
        return recipe_file, [*KEYS, *split, *keys, f"output_dir={tmp_path / name}"]

    alone = [
        job("plain", 8, 1, ZERO[0], "save_steps=1"),
        job("resumed", 8, 1, ZERO[0], f"resume_from_checkpoint={tmp_path / 'plain'}/checkpoint-1"),
        job("split", 2, 4, ZERO[3], "gradient_checkpointing=true"),
        job("lora", 8, 1, ZERO[0], "use_peft=true", "max_steps=1"),
    ]
    run_jobs(1, alone)
    run_jobs(2, [job("ranks", 2, 2, ZERO[1])])

    plain = torch.tensor(read_metrics(tmp_path / "plain")[:3])
    assert read_metrics(tmp_path / "resumed")[:2] == read_metrics(tmp_path / "plain")[1:3]
    for name in ("split", "ranks"):
        torch.testing.assert_close(torch.tensor(read_metrics(tmp_path / name)[:3]), plain, rtol=0, atol=1e-5)
    # adapters begin as nothing, so the first loss is the model's
    assert read_metrics(tmp_path / "lora")[0] == pytest.approx(plain[0].item(), abs=1e-5)
