"""`dtype: auto`: the faster precision of the device, one for all ranks, kept by a resumed run; bfloat16 where it is slow."""

import json
from pathlib import Path

import pytest
import yaml

from dfactory import inference
from dfactory.cli import main
from dfactory.engine.trainer import deepspeed_config
from dfactory.errors import ConfigError
from dfactory.inference import Pipeline
from dfactory.models import precision
from dfactory.models.precision import faster_precision
from dfactory.models.registry import load_policy
from dfactory.models.saving import save_policy
from dfactory.recipe import load_recipe
from dfactory.runs.precision import settled
from dfactory.train import train
from tests.engine.conftest import BLOCK, EOS, GOLDEN, MASK, read_metrics

AUTO = "dtype=auto"
SHORT = ["eval_datasets=[]", "save_steps=2", AUTO]


@pytest.fixture
def cpu_of(monkeypatch):
    """cpu_of(speed): a CPU that multiplies so many times as fast in bfloat16, whatever this one does."""

    def replace(speed: float) -> None:
        monkeypatch.setattr(precision, "bfloat16_speed", lambda: speed)
        faster_precision.cache_clear()

    yield replace
    faster_precision.cache_clear()


@pytest.fixture
def slow_bfloat16(cpu_of):
    cpu_of(0.11)


@pytest.fixture
def fast_bfloat16(cpu_of):
    cpu_of(2.3)


def dtype_of(run: Path) -> str:
    return yaml.safe_load((run / "config.yaml").read_text())["dtype"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_auto_is_the_faster_precision_of_the_device(device, recipe_file):
    recipe = load_recipe(recipe_file, [AUTO])
    with pytest.raises(ConfigError, match="dtype auto is settled when a run begins"):
        deepspeed_config(recipe)
    found = settled(recipe, device)
    assert found.dtype == ("bfloat16" if device == "cuda" else faster_precision("cpu").dtype)
    assert f"dtype {found.dtype}: " in found.note
    assert found.recipe(recipe).dtype == found.dtype
    stated = load_recipe(recipe_file, ["dtype=bfloat16"])
    assert settled(stated, device) == ("bfloat16", None)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_resumed_run_keeps_the_precision_of_its_checkpoint(stored, recipe_file, tmp_path, capsys):
    """One of the two is not what this machine would choose."""
    keys = [*SHORT, f"output_dir={tmp_path}"]
    assert train(load_recipe(recipe_file, [*keys, "max_steps=4", f"dtype={stored}"])) == 0
    assert train(load_recipe(recipe_file, [*keys, "max_steps=5", "resume_from_checkpoint=true"])) == 0
    assert f"dtype {stored}, as in {tmp_path / 'checkpoint-4'}" in " ".join(capsys.readouterr())
    assert dtype_of(tmp_path) == stored


@pytest.mark.slow
def test_two_ranks_train_in_the_precision_that_the_first_one_finds(recipe_file, run_jobs, tmp_path):
    """With the losses of the same precision, stated."""
    found = faster_precision("cpu").dtype
    folders = {key: tmp_path / key for key in ("auto", found)}
    run_jobs(
        2, [(recipe_file, [*SHORT, "max_steps=2", f"dtype={key}", f"output_dir={run}"]) for key, run in folders.items()]
    )
    assert read_metrics(folders["auto"]) == read_metrics(folders[found])
    assert dtype_of(folders["auto"]) == found


def test_bfloat16_where_it_is_slow_is_told(slow_bfloat16, recipe_file, tmp_path, capsys):
    reason = "this CPU multiplies matrices 0.11 times as fast in bfloat16 as in float32 (measured)"
    keys = ["eval_datasets=[]", "max_steps=1", f"output_dir={tmp_path / 'run'}"]
    assert train(load_recipe(recipe_file, [*keys, "dtype=bfloat16"])) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert f"dtype bfloat16: {reason}. dtype=auto takes the faster one" in told
    main(["check", str(recipe_file), *keys, "dtype=bfloat16"])
    assert "dtype=auto takes the faster one" in capsys.readouterr().out
    main(["check", str(recipe_file), *keys, AUTO])
    page = " ".join(capsys.readouterr().out.split())
    assert f"float32; pretrained weights dtype float32: {reason}" in page
    main(["check", str(recipe_file), *keys, AUTO, "--gpus", "8"])
    assert "dtype bfloat16: a GPU multiplies it faster" in capsys.readouterr().out


def test_the_warning_is_not_given_where_bfloat16_is_fast(fast_bfloat16, recipe_file, tmp_path, capsys):
    keys = ["eval_datasets=[]", "max_steps=1", "dtype=bfloat16", f"output_dir={tmp_path}"]
    assert train(load_recipe(recipe_file, keys)) == 0
    assert "times as fast" not in capsys.readouterr().err


@pytest.fixture
def half(tmp_path) -> Path:
    """A checkpoint in bfloat16."""
    (tmp_path / "half").mkdir()
    save_policy(load_policy(GOLDEN, dtype="bfloat16"), tmp_path / "half")
    return tmp_path / "half"


def dtype_read(model: Path, **options) -> str:
    return str(
        Pipeline(
            model, device="cpu", block_size=BLOCK, mask_token_id=MASK, eos_token_id=EOS, **options
        ).policy.model.dtype
    ).removeprefix("torch.")


def test_a_pipeline_widens_bfloat16_where_it_is_slow(slow_bfloat16, half, caplog, monkeypatch):
    assert dtype_read(half) == "float32"
    assert "dtype float32 in place of the checkpoint's bfloat16: this CPU" in caplog.text
    assert dtype_read(half, dtype="bfloat16") == "bfloat16"
    caplog.clear()
    assert dtype_read(GOLDEN) == "float32"
    assert caplog.text == ""
    monkeypatch.setattr(inference, "fits_in_float32", lambda model_dir: False)
    assert dtype_read(half) == "bfloat16"
    assert "dtype bfloat16, as float32 would take more than half of the free memory" in caplog.text


def test_a_pipeline_leaves_a_checkpoint_as_it_is_where_that_is_fast(fast_bfloat16, half, caplog):
    assert dtype_read(half) == "bfloat16"
    assert dtype_read(GOLDEN) == "float32"
    assert caplog.text == ""


def test_what_fits_is_measured_by_the_weight_files(half):
    stored = sum(file.stat().st_size for file in half.glob("*.safetensors"))
    assert precision.fits_in_float32(half) == (4 * stored <= precision.psutil.virtual_memory().available)
    assert json.loads((half / "config.json").read_text())["torch_dtype"] == "bfloat16"
