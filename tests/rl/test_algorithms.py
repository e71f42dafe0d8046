"""Every algorithm of reinforcement learning trains, with each pattern of attention: real rollouts, rewards and steps, in one
process."""

import json
import math

import pytest

from benchmarks.staleness import train
from dfactory.algorithms import ALGORITHMS, Data
from tests.rl.models import write_model

KEYS = [
    *("num_generations=4", "prompts_per_step=2", "max_steps=2", "warmup_steps=0"),
    *(
        "num_iterations=2",
        "decode.max_new_tokens=16",
        "decode.threshold=0.5",
        "eval_datasets=[]",
        "eval_decode_prompts=0",
    ),
]
REWARD = """
def capitals(prompts, completions, completion_ids, **columns):
    texts = [completion[0]["content"] for completion in completions]
    return [sum(letter < "N" for letter in text) - 0.1 * len(ids) for text, ids in zip(texts, completion_ids)]
"""


WHOLE = ["block_size=null", "row_length=null", "decode.block_size=8"]
PATTERNS = {
    "block-causal": lambda folder: ["model_name_or_path=tiny"],
    "full, shifted": lambda folder: [*write_model(folder, "Dream"), *WHOLE],
}


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", [a.name for a in ALGORITHMS if a.data is Data.PROMPTS])
def test_two_steps_of_each(name, pattern, tmp_path):
    (tmp_path / "reward.py").write_text(REWARD)
    reward = f"reward_funcs=['{tmp_path}/reward.py:capitals']"
    model = PATTERNS[pattern](tmp_path / "model")
    train("rl.yaml", tmp_path / "run", [*KEYS, *model, reward, "reward_workers=1", f"policy_loss={name}"])
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert math.isfinite(row["loss"])
        assert row["grad_norm"] > 0
