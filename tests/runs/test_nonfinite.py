"""A NaN or Inf on one rank: no rank applies the step, whatever shards the work; the run stops, or counts and goes on."""

import json
from pathlib import Path

import pytest
import torch

from dfactory import distributed
from dfactory.assembly import make_source, read_inputs
from dfactory.engine.schedule import learning_rate_schedule
from dfactory.engine.trainer import deepspeed_config
from dfactory.engine.window import spread_nonfinite, window_counts
from dfactory.errors import CheckpointError, ConfigError
from dfactory.recipe import load_recipe
from dfactory.runs.folder import RunFolder
from dfactory.runs.nonfinite import NonFiniteGuard
from dfactory.types import TrainState
from tests.engine.conftest import GOLDEN, ROOT, launch, read_metrics
from tests.engine.test_equality import ZERO
from tests.reference import reference_losses

STEPS, BAD = 4, 2  # the spoilt step


def _rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _job(recipe: Path, run: Path, keys: list[str], kind: str, *, call: int = BAD, rank: int = 0) -> dict:
    base = ["eval_datasets=[]", f"max_steps={STEPS}", "weight_decay=0.1", f"output_dir={run}"]
    plant = {"rank": rank, "call": call, "kind": kind}
    return {"recipe": str(recipe), "overrides": [*base, *keys], "plant": plant}


def _run(processes: int, jobs: list[dict], folder: Path) -> None:
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    done = launch(processes, "planted_worker.py", file)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def _losses_without_the_bad_step(recipe_file: Path) -> list[float]:
    """Plain torch, which never sees the spoilt window; every other step has the learning rate of its number."""
    recipe = load_recipe(recipe_file, [f"max_steps={STEPS}"])
    source = make_source(recipe, read_inputs(recipe), rank=0, world_size=1)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=recipe.learning_rate)
    schedule = learning_rate_schedule(recipe, optimizer, STEPS)
    windows, rates = [], []
    for step in range(1, STEPS + 1):
        window, rate = source.next_window(), optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()
        if step != BAD:
            windows.append(window)
            rates.append(rate)
    return reference_losses(GOLDEN, windows, rates, weight_decay=recipe.weight_decay)


KINDS = {0: "inf", 1: "nan", 2: "gradient", 3: "inf"}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_skipped_step_leaves_weights_and_optimiser_as_they_were(recipe_file, tmp_path, processes):
    """So the run equals one of plain torch that never saw that window. Rank 1's first micro-batch of step 2 is spoilt."""
    jobs = {}
    rows, accumulation = (8, 1) if processes == 1 else (2, 2)
    for stage, kind in KINDS.items():
        run = tmp_path / f"zero{stage}-{kind}"
        keys = [ZERO[stage], "skip_nonfinite=1", f"per_device_train_batch_size={rows}"]
        keys += [f"gradient_accumulation_steps={accumulation}"]
        call = (BAD - 1) * accumulation + 1
        jobs[run] = _job(recipe_file, run, keys, kind, call=call, rank=processes - 1)
    bfloat16 = tmp_path / "bfloat16"
    keys = [ZERO[1], "skip_nonfinite=1", "dtype=bfloat16", "save_steps=1", "per_device_train_batch_size=4"]
    jobs[bfloat16] = _job(recipe_file, bfloat16, keys, "nan", rank=processes - 1)
    _run(processes, list(jobs.values()), tmp_path)

    expected = torch.tensor(_losses_without_the_bad_step(recipe_file))
    for run in jobs:
        rows = _rows(run)
        assert [row["skipped_steps"] for row in rows] == [0, 1, 1, 1], run.name
        assert rows[BAD - 1]["grad_norm"] is None
        assert (rows[BAD - 1]["loss"] is None) == ("gradient" not in run.name), run.name
        if run == bfloat16:
            models = [(run / f"checkpoint-{step}/model.safetensors").read_bytes() for step in (1, 2, 3)]
            assert models[0] == models[1] != models[2]
        else:
            losses = torch.tensor([row["loss"] for row in rows if row["step"] != BAD])
            assert (losses - expected).abs().max() < 1e-5, run.name
        dumps = sorted(file.name for file in (run / "nonfinite").iterdir())
        culprits = range(processes) if "gradient" in run.name else [processes - 1]
        assert dumps == [f"step-{BAD}-rank-{rank}.json" for rank in culprits], run.name


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_by_default_the_first_one_stops_all_ranks_and_leaves_a_dump(recipe_file, tmp_path, processes):
    culprit = processes - 1
    stop, second = tmp_path / "stop", tmp_path / "second"
    keys = ["save_steps=1", "per_device_train_batch_size=4", "deepspeed=null"]
    resumed = [*keys, "skip_nonfinite=1", "resume_from_checkpoint=true", "max_steps=3"]
    jobs = [
        _job(recipe_file, stop, keys, "nan", rank=culprit),
        _job(recipe_file, second, [*keys, "skip_nonfinite=1", "max_steps=2"], "nan", rank=culprit),
        _job(recipe_file, second, resumed, "inf", call=1, rank=culprit),  # the count was saved with checkpoint-2
    ]
    _run(processes, jobs, tmp_path)

    for run, step, allowed in ((stop, 2, 0), (second, 3, 1)):
        for rank in range(processes):
            outcome = Path(f"{run}.rank-{rank}").read_text()
            assert outcome.startswith(f"1 step {step}: the loss of rank {culprit} is NaN or infinite"), outcome
            assert f"skip_nonfinite allows {allowed}" in outcome
            assert str(run / "nonfinite") in outcome
        assert (run / "LATEST").read_text() == f"checkpoint-{step - 1}\n"
        assert not (run / f"checkpoint-{step}").exists()
        assert read_metrics(run, "step") == list(range(1, step))
        (file,) = (run / "nonfinite").glob(f"step-{step}-*")
        assert file.name == f"step-{step}-rank-{culprit}.json"
        dump = json.loads(file.read_text())
        assert [part["loss"] for part in dump["micro_batches"]] == ["nan" if run == stop else "inf"]
        documents = dump["micro_batches"][0]["documents"]
        assert documents
        assert all(0 < t <= 1 for document in documents for t in document["t"]["view 1"])
        assert all(1 <= document["document_id"] <= 40 for document in documents)  # lines of the one file


RL = ["model_name_or_path=tiny", "max_length=16", "decode.max_new_tokens=10", "block_size=4", "warmup_steps=0"]
EBPO = ["policy_loss=ebpo", "num_views=2", "complementary=false", "row_length=32"]  # replayed: two micro-batches
POLICY = {"trace": ["policy_loss=trace"], "ebpo": EBPO, "stable": [*EBPO, "ratio_clip=unconditional"]}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_policy_gradient_skips_and_stops(tmp_path, processes):
    recipe, jobs = ROOT / "recipes/quickstart/rl.yaml", {}
    for (name, keys), (stage, kind) in zip(POLICY.items(), [(0, "nan"), (3, "inf"), (1, "gradient")], strict=True):
        run = tmp_path / name
        every = [*RL, *keys, ZERO[stage], "skip_nonfinite=1", "eval_decode_prompts=0"]
        jobs[run] = _job(recipe, run, [*every, "dtype=float32"], kind, call=1, rank=processes - 1)
    stop = _job(recipe, tmp_path / "stop", [*RL, *EBPO, "eval_decode_prompts=0"], "nan", call=1, rank=processes - 1)
    _run(processes, [*jobs.values(), stop], tmp_path)
    for run in jobs:
        rows = _rows(run)
        assert [row["skipped_steps"] for row in rows] == [1] * STEPS, run.name
        assert rows[1]["grad_norm"] > 0
        assert rows[1]["logprob_change"] < 1e-4
    for rank in range(processes):
        assert (tmp_path / f"stop.rank-{rank}").read_text().startswith("1 step 1: the loss of rank")
    assert not list((tmp_path / "stop").glob("checkpoint-*"))


@pytest.mark.parametrize("value, factor", [(2.0, 1.0), (-0.0, 1.0), (torch.inf, torch.nan), (torch.nan, torch.nan)])
def test_only_a_loss_that_is_not_finite_spoils_its_gradient(value, factor):
    x = torch.tensor(3.0, requires_grad=True)
    loss = spread_nonfinite(x + (value - x.detach()))
    loss.backward()
    assert torch.equal(x.grad.nan_to_num(nan=7.0), torch.tensor(factor).nan_to_num(nan=7.0))
    assert loss.item() == value or not torch.isfinite(loss)


@pytest.mark.parametrize("count", [float("inf"), float("nan")])
def test_a_count_that_is_not_finite_does_not_look_like_a_loss_of_zero(count):
    class Counting:
        def counts(self, batch, scores):
            return {"policy": count, "kl": 0.0}

    counts = window_counts(Counting(), [None], [None], lambda tensor: None)
    assert counts["policy"] != counts["policy"]
    assert counts["kl"] == 1.0


@pytest.mark.parametrize(
    "overrides, said",
    [
        ("{zero_optimization: {stage: 2, compute_grad_norm: false}}", "compute_grad_norm false"),
        ("{bf16: {check_grad_overflow: false}}", "check_grad_overflow"),
    ],
)
def test_deepspeed_keys_that_would_apply_a_nan_are_refused(recipe_file, overrides, said):
    recipe = load_recipe(recipe_file, [f"deepspeed_overrides={overrides}"])
    with pytest.raises(ConfigError, match=said):
        deepspeed_config(recipe)


def test_a_dump_that_cannot_be_written_ends_the_run_by_name(recipe_file, tmp_path):
    """As on a full or read-only disk; a file stands where the folder of dumps would."""
    recipe = load_recipe(recipe_file, [])
    window = make_source(recipe, read_inputs(recipe), rank=0, world_size=1).next_window()
    distributed.start()
    folder = RunFolder(tmp_path)
    folder.nonfinite.touch()
    guard = NonFiniteGuard(folder, allowed=1, rank=0, world_size=1)
    with pytest.raises(CheckpointError, match=f"{folder.nonfinite} could not be written"):
        guard.check(TrainState(step=1), window, [torch.tensor(torch.nan) for _ in window], float("nan"))
