"""benchmarks/conversion.py: plans, the budget of CPU time, and a whole comparison of two arms on the embedded model."""

import json
import subprocess
import sys

import pytest

from benchmarks import conversion
from benchmarks.conversion import ARMS, Arm, count, make_plans, parse, plan_of, schedule
from dfactory.assembly import read_inputs
from dfactory.recipe import load_recipe
from tests.test_assets import DATA

RECIPE = DATA.parent / "sft.yaml"


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """Of a command over 60 records of the quickstart and 6 held-out ones."""
    folder = tmp_path_factory.mktemp("records")
    for name, lines in (("train", 60), ("heldout", 6)):
        rows = (DATA / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(rows[:lines]))
    keys = [f"datasets=[{{path: {folder / 'train.jsonl'}}}]", "stage=cpt", "row_length=320", "warmup_steps=0"]
    return [str(RECIPE), "--data", str(folder / "heldout.jsonl"), "--positions", "300", *keys]


def test_blocks_grow_in_equal_shares_of_the_first_half():
    assert schedule(8, 20) == [[0, 1], [5, 4], [10, 8]]
    assert schedule(32, 80) == [[0, 1], [10, 4], [20, 8], [30, 16], [40, 32]]
    assert schedule(1, 20) is None
    assert schedule(32, 5) is None  # fewer steps than sizes


def test_an_arm_has_the_bases_keys_but_for_its_own(words, tmp_path):
    options = parse([*words, "--output", str(tmp_path)])
    plans = make_plans(options)
    assert set(plans) == set(ARMS)
    recipes = {name: load_recipe(RECIPE, plan.keys) for name, plan in plans.items()}
    base = recipes["base"]
    assert (base.block_size, base.stage, base.mask_embedding_noise) == (8, "cpt", 0)
    assert [size for _, size in base.block_size_schedule] == [1, 4, 8]
    assert [size for _, size in recipes["block-16"].block_size_schedule] == [1, 4, 8, 16]
    assert recipes["at-once"].block_size_schedule is None
    assert recipes["lora"].use_peft
    assert (base.logit_shift, recipes["shift"].logit_shift) == (None, 1)
    assert recipes["rate-triple"].learning_rate == pytest.approx(3 * base.learning_rate)
    assert not recipes["single"].complementary
    assert recipes["noise"].mask_embedding_noise == conversion.NOISE
    assert plans["short"].positions[-1] < 200 < 300 <= plans["base"].positions[-1]
    for name, recipe in recipes.items():
        assert recipe.max_steps == plans[name].steps
        assert recipe.save_steps * options.checkpoints >= recipe.max_steps


def test_positions_are_the_response_tokens_of_the_batches(words, tmp_path):
    options = parse([*words, "--output", str(tmp_path)])
    recipe = load_recipe(RECIPE, [*options.overrides, "eval_datasets=[]"])
    inputs = read_inputs(recipe)
    plan = plan_of(Arm(scheduled=False), recipe, inputs, options)
    recipe = load_recipe(RECIPE, plan.keys)
    source, seen = conversion.make_source(recipe, inputs, 0, 1), 0
    for positions in plan.positions:
        seen += sum(int(batch.answer_length_D.sum()) for batch in source.next_window())
        assert positions == seen
    assert count(recipe, inputs, 1) == plan.positions[:1]


def test_a_run_that_has_used_its_cpu_time_is_asked_to_end(monkeypatch):
    monkeypatch.setattr(conversion, "POLL", 0.05)
    code = "import signal; signal.signal(signal.SIGTERM, lambda *_: exit(75))\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", code])
    assert conversion.watch(process, limit=0.3) > 0.3
    assert process.returncode == 75


def found(arm: str, elbo: float, **others) -> dict:
    curve = [{"step": 2, "positions": 500, "elbo": elbo - 1}, {"step": 4, "positions": 1000, "elbo": elbo}]
    return {"arm": arm, "seed": 0, "complete": True, "predicted": 1100, "cpu_seconds": 9.0, "curve": curve} | others


def test_the_table_has_means_over_seeds_and_the_gap_to_the_exact_one():
    results = [found("base", -0.5), found("base", -0.7, seed=1), found("lora", -1.0, complete=False)]
    page = conversion.table(results, ["base", "lora"], exact=-0.4)
    assert "| base | 2 | 1,000 | 1,100 | 9 | -0.600 ± 0.141 | 0.200 |" in page
    assert "| lora (stopped) | 1 | 1,000 | 1,100 | 9 | -1.000 | 0.600 |" in page
    assert "| autoregressive, exact | | | | | -0.400 | 0 |" in page


@pytest.mark.slow
def test_two_arms_are_trained_measured_drawn_and_not_repeated(words, tmp_path, capsys):
    """Each of a few steps; the second call reads what the first one found, and refuses other settings."""
    command = [*words, "--output", str(tmp_path), "--arms", "base", "single", "--checkpoints", "2", "--elbo-pairs", "1"]
    assert conversion.main([*command, "--held-out", "4"]) == 0
    shown = capsys.readouterr().out
    assert "| base | 1 |" in shown
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["arm"] for line in lines] == ["base", "base", "single", "single"]
    assert all(line["complete"] and line["elbo"] < 0 for line in lines)
    base, single = (json.loads((tmp_path / f"{arm}-0" / "result.json").read_text()) for arm in ("base", "single"))
    assert base["predicted"] > 1.5 * single["predicted"]
    assert base["cpu_seconds"] > 0
    assert len(list((tmp_path / "base-0/run").glob("checkpoint-*"))) == 1  # the last alone is kept
    assert conversion.main([*command, "--held-out", "4"]) == 0
    assert "steps," not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="was measured with"):
        conversion.main([*command, "--held-out", "5"])
