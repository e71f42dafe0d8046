"""Top-k merges of real runs: what is chosen, what comes out, what is refused without a trace."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dfactory.cli import main
from dfactory.commands.merge import best_checkpoints, merge
from dfactory.config.load import load_merge_keys
from dfactory.config.merge import MergeKeys
from dfactory.errors import CheckpointError, ConfigError
from dfactory.models.manifest import MANIFEST
from dfactory.models.registry import load_policy
from dfactory.runs.folder import RunFolder


def make_run(folder: Path, rows: list[dict], steps: tuple[int, ...]) -> RunFolder:
    """A run folder with these metrics and empty checkpoints."""
    for step in steps:
        (folder / f"checkpoint-{step}/engine").mkdir(parents=True)
        (folder / f"checkpoint-{step}/engine/state.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunFolder(folder)


def chosen(folder: RunFolder, *words: str) -> list[str]:
    return [ranked.path.name for ranked in best_checkpoints(folder, load_merge_keys(list(words)))]


ROWS = [
    {"step": 1, "loss": 1.0},
    {"step": 1, "eval/loss": 0.5, "eval/hit_rate": 0.1},
    {"step": 2, "eval/loss": 0.3, "eval/hit_rate": 0.2},
    {"step": 3, "eval/loss": 0.4, "eval/hit_rate": 0.3},
    {"step": 4, "eval/loss": float("nan"), "eval/hit_rate": 0.4},
    {"step": 5, "loss": 0.1},
    {"step": 6, "eval/loss": 0.4},
]


def test_what_is_chosen(tmp_path):
    run = make_run(tmp_path, ROWS, steps=(1, 2, 3, 4, 5, 6))
    assert chosen(run, "topk=1") == ["checkpoint-2"]
    assert chosen(run, "topk=4") == ["checkpoint-2", "checkpoint-6", "checkpoint-3", "checkpoint-1"]
    assert chosen(run, "topk=2", "metric=eval/hit_rate") == ["checkpoint-4", "checkpoint-3"]
    assert chosen(run, "topk=2", "metric=eval/hit_rate", "mode=min") == ["checkpoint-1", "checkpoint-2"]
    assert chosen(run, "topk=2", "mode=max") == ["checkpoint-1", "checkpoint-6"]
    assert chosen(run, "topk=2", "metric=loss") == ["checkpoint-5", "checkpoint-1"]


@pytest.mark.parametrize(
    "keep, best_by, left",
    [
        (None, "eval/loss", [1, 2, 3, 4, 5, 6]),
        (1, "eval/loss", [2, 6]),
        (2, "eval/loss", [2, 6]),
        (3, "eval/loss", [2, 5, 6]),
        (9, "eval/loss", [1, 2, 3, 4, 5, 6]),
        (1, None, [6]),
        (2, None, [5, 6]),
        (1, "eval/hit_rate", [4, 6]),
        (2, "unknown", [5, 6]),
    ],
)
def test_the_best_checkpoint_outlives_the_limit(tmp_path, keep, best_by, left):
    run = make_run(tmp_path, ROWS, steps=(1, 2, 3, 4, 5, 6))
    run.remove_old(keep, best_by, smaller_is_better=best_by != "eval/hit_rate")
    assert run.checkpoints() == [run.checkpoint(step) for step in left]


@pytest.mark.parametrize(
    "metric, smaller", [("eval/loss_t0.5", True), ("NLL", True), ("eval/perplexity", True), ("eval/hit_rate", False)]
)
def test_the_direction_follows_the_name(metric, smaller):
    assert MergeKeys(topk=1, metric=metric).smaller_is_better is smaller


def test_too_few_are_told_with_the_remedy(tmp_path):
    run = make_run(tmp_path, ROWS, steps=(2, 5))
    message = r"topk 2, but .* has 1 checkpoint\(s\) .*: checkpoint-2 \(0.3\), and without one checkpoint-5: .*"
    with pytest.raises(ConfigError, match=message + "save_total_limit at least 2 .* eval_steps = save_steps"):
        chosen(run, "topk=2")
    with pytest.raises(ConfigError, match=r"metric eval/los is not in .*: it has eval/hit_rate, eval/loss, loss;"):
        chosen(run, "topk=1", "metric=eval/los")


@pytest.mark.parametrize(
    "words, message",
    [
        (["metric=eval/loss"], "topk missing in --merge"),
        (["topk=1", "--dtype", "bfloat16"], "--dtype with --merge"),
        (["topk=0"], "topk 0 in --merge: it must be at least 1"),
        (["topk=1", "mode=least"], "mode least in --merge"),
        (["topk=1", "metrik=loss"], "unknown key metrik in --merge; did you mean metric?"),
        (["best"], "'best' is not key=value"),
    ],
)
def test_wrong_words(words, message, tmp_path, capsys):
    assert main(["export", "--model", str(tmp_path), "--output", str(tmp_path / "out"), "--merge", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_is_no_run(golden_run, tmp_path):
    with pytest.raises(ConfigError, match=r"holds no metrics.jsonl: --merge chooses among the checkpoints of a run"):
        merge(str(golden_run / "checkpoint-3"), str(tmp_path / "out"), MergeKeys(topk=1))


# --- real runs --------------------------------------------------------------------------------------------------------


def values(run: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {f"checkpoint-{row['step']}": row["eval/loss"] for row in rows if "eval/loss" in row}


def test_the_mean_of_a_real_run(golden_run, tmp_path, capsys):
    words = ["--merge", "topk=2", "metric=eval/loss"]
    assert main(["export", "--model", str(golden_run), "--output", str(tmp_path / "out"), *words]) == 0
    told = capsys.readouterr().out
    best, second = sorted(values(golden_run), key=values(golden_run).get)[:2]
    assert f"smallest first: {best} ({values(golden_run)[best]:.6g}), {second} (" in told
    assert "averaged again in float64" in told
    a, b = (load_file(golden_run / name / "model.safetensors") for name in (best, second))
    mean = load_file(tmp_path / "out/model.safetensors")
    assert mean.keys() == a.keys()
    assert all(torch.equal(mean[name], (a[name] + b[name]) / 2) for name in mean)
    assert not torch.equal(mean["lm_head.weight"], a["lm_head.weight"])
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *("NOTICE", "config.json", "generation_config.json", "model.safetensors", "modeling_x.py"),
        *("README.md", "dfactory.json"),
    }
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (golden_run / best / name).read_bytes()
    assert load_policy(tmp_path / "out").config.vocab_size == 160


def test_the_best_alone_is_an_export(golden_run, tmp_path, capsys):
    assert merge(str(golden_run), str(tmp_path / "out"), MergeKeys(topk=1)) == 0
    best = min(values(golden_run), key=values(golden_run).get)
    written, stored = (path / "model.safetensors" for path in (tmp_path / "out", golden_run / best))
    assert written.read_bytes() == stored.read_bytes()
    assert "bit by bit" in capsys.readouterr().out


def test_adapters_of_a_real_run(lora_run, tmp_path, capsys):
    assert merge(str(lora_run), str(tmp_path / "out"), MergeKeys(topk=2)) == 0
    told = capsys.readouterr().out
    assert "averaged 8 adapter products: within" in told
    assert "8 tensors changed" in told
    mean = load_file(tmp_path / "out/model.safetensors")
    each = [dict(load_policy(lora_run / f"checkpoint-{n}").model.merge_and_unload().state_dict()) for n in (1, 2)]
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.o_proj.weight"):
        torch.testing.assert_close(mean[name], (each[0][name] + each[1][name]) / 2, atol=1e-6, rtol=1e-6)
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["block_size"] == 8


def test_a_refusal_leaves_nothing(golden_run, tmp_path):
    run = shutil.copytree(golden_run, tmp_path / "run")
    for name in ("checkpoint-1", "checkpoint-2"):
        shutil.copyfile(run / "checkpoint-3/model.safetensors", run / name / "model.safetensors")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match="hold the same numbers: there is nothing to average"):
        merge(str(run), str(tmp_path / "out"), MergeKeys(topk=3))
    tensors = load_file(run / "checkpoint-3/model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, run / "checkpoint-2/model.safetensors")
    (run / "checkpoint-2" / MANIFEST).unlink()  # it would refuse the file by its size
    before.remove(run / "checkpoint-2" / MANIFEST)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        merge(str(run), str(tmp_path / "out"), MergeKeys(topk=3))
    assert sorted(tmp_path.rglob("*")) == before
