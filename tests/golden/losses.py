"""The golden losses: five steps of each objective on the tiny model, through the training loop on one rank, in fp32.

`python -m tests.golden.losses` writes tests/golden/losses/*.json anew; README.md beside it says when.
"""

import json
import tempfile
from pathlib import Path

from dfactory.recipe import load_recipe
from dfactory.train import learn
from tests.engine.conftest import write_dpo_keys, write_recipe
from tests.rl.test_source import FakeClient

FOLDER = Path(__file__).parent / "losses"
STEPS = 5
CAP = ["stage=cap", "confidence_beta=0.5", "entropy_temperature=0.5", "complementary=true"]
RL = [
    "stage=rl",
    "decode.temperature=1.0",
    "decode.acceptance=top",
    "reward_funcs=[exact_match]",
    "complementary=false",
    "decode.max_new_tokens=10",
    "block_size=4",
    "max_length=16",
]
OBJECTIVES = {
    "sft": ["loss_weight=elbo"],
    "cap": CAP,
    "dpo": ["learning_rate=1e-4", "sft_loss_coef=0.1"],  # and pairs
    "ebpo": [*RL, "policy_loss=ebpo", "learning_rate=1e-6", f"num_iterations={STEPS}", "num_views=2"],  # a fixed batch
}


def measure(objective: str, folder: Path) -> dict[str, list[float]]:
    """The losses and gradient norms of an objective's steps, trained in `folder`."""
    keys = [*write_dpo_keys(folder), *OBJECTIVES["dpo"]] if objective == "dpo" else OBJECTIVES[objective]
    common = [f"max_steps={STEPS}", "warmup_steps=0", "eval_datasets=[]", f"output_dir={folder}/run"]
    common += ["deepspeed=null", "per_device_train_batch_size=2"]
    (folder / "recipe").mkdir()
    recipe = load_recipe(write_recipe(folder / "recipe"), [*keys, *common])
    assert learn(recipe, FakeClient() if recipe.stage == "rl" else None) == 0
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return {name: [row[name] for row in rows] for name in ("loss", "grad_norm")}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for objective in OBJECTIVES:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(objective, Path(folder))
        (FOLDER / f"{objective}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
