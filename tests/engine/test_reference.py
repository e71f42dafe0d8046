"""What a DPO run is compared with: a copy, the adapters off, or stored scores: always the initial model, nothing else."""

import collections
import contextlib
import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy
import pytest
import torch

from dfactory import faults
from dfactory.algorithms.elbo import elbo
from dfactory.assembly import load_initial, make_source, read_inputs
from dfactory.cli import main
from dfactory.engine import stored as stored_scores
from dfactory.engine.reference import ReferenceSource
from dfactory.errors import CheckpointError, ConfigError
from dfactory.recipe import load_recipe
from tests.engine.conftest import ROOT, read_metrics
from tests.engine.test_equality import ZERO

SMALL = ["per_device_train_batch_size=2", "gradient_accumulation_steps=2", "max_steps=3", "warmup_steps=0"]


@pytest.fixture(scope="module")
def runs(recipe_file, dpo_keys, tmp_path_factory):
    """run(name, key, ...) trains three steps and returns (exit status, run folder)."""
    folder = tmp_path_factory.mktemp("dpo")

    def run(name: str, *keys: str):
        return main(["train", str(recipe_file), *dpo_keys, *SMALL, f"output_dir={folder / name}", *keys]), folder / name

    return run


@pytest.fixture(scope="module")
def copied(runs):
    return runs("copy", "reference=copy", "save_steps=2")[1]


@pytest.fixture(scope="module")
def stored(runs):
    return runs("precomputed", "reference=precomputed", "save_steps=2")[1]


def weights(run, step=3) -> bytes:
    return (run / f"checkpoint-{step}/model.safetensors").read_bytes()


def test_the_first_step_is_at_the_reference(copied, stored, runs):
    """Margins are exactly 0, all pairs ties, and the loss is log 2, wherever the reference comes from."""
    status, adapted = runs("adapter", "use_peft=true")
    assert status == 0
    for run in (copied, stored, adapted):
        first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert [first[f"rewards/{name}"] for name in ("chosen", "rejected", "margins", "accuracies")] == [0, 0, 0, 0.5]
        assert first["grad_norm"] > 0
        assert read_metrics(run, "rewards/margins")[-1] != 0
        assert 0 <= read_metrics(run, "eval/rewards/accuracies")[-1] <= 1


def test_stored_scores_are_those_of_the_copy(copied, stored):
    for name in ("loss", "rewards/margins", "eval/rewards/margins"):
        assert read_metrics(stored, name) == read_metrics(copied, name)
    assert weights(stored) == weights(copied)


@pytest.mark.parametrize("reference", ["copy", "precomputed"])
def test_a_resumed_run_is_bitwise_the_undisturbed_one(copied, stored, runs, tmp_path, reference):
    whole = {"copy": copied, "precomputed": stored}[reference]
    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("checkpoint-3", "LATEST"))
    (resumed / "LATEST").write_text("checkpoint-2\n")
    keys = [f"reference={reference}", "save_steps=2", f"output_dir={resumed}", "resume_from_checkpoint=true"]
    assert runs("unused", *keys)[0] == 0
    assert read_metrics(resumed) == read_metrics(whole)
    assert weights(resumed) == weights(whole)


@pytest.mark.parametrize("fault, told", [("enospc", "No space left on device"), ("short", "cannot be read")])
def test_scores_that_were_not_written_whole_are_computed_again(
    stored, runs, tmp_path, monkeypatch, capsys, fault, told
):
    """The run ends, and leaves no file that a resumed one would take for whole."""
    keys = ["reference=precomputed", "save_steps=2", f"output_dir={tmp_path}/run"]
    monkeypatch.setattr(faults, "_passed", collections.Counter())
    monkeypatch.setenv(faults.VARIABLE, f"reference.safetensors.written:1:{fault}")
    assert runs("unused", *keys)[0] == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run" / "reference.safetensors").exists()
    monkeypatch.delenv(faults.VARIABLE)
    assert runs("unused", *keys)[0] == 0
    assert weights(tmp_path / "run") == weights(stored)


OTHERS = {
    "model": ([f"model_name_or_path={ROOT}/tests/golden/llada21_tiny"], "another model"),
    "noise": (["noise_range_low=0.2"], "another noise_range_low: 0.3 there, 0.2 here"),
    "seed": (["seed=1"], "another seed: 42 there, 1 here"),
    "mask": (["mask_token_id=157"], "another mask_token_id: 158 there, 157 here"),
    "EOS": (["eos_token_id=155"], "another eos_token_id: 156 there, 155 here"),
    "longer run": (["max_steps=9"], "has no score of document"),
}


@pytest.mark.parametrize("keys, message", OTHERS.values(), ids=OTHERS)
def test_stored_scores_of_something_else_are_refused(stored, runs, tmp_path, capsys, keys, message):
    file = stored / "reference.safetensors"
    again = ["reference=precomputed", f"reference_path={file}", f"output_dir={tmp_path}/run"]
    status, _ = runs("unused", *again, *keys)
    told = capsys.readouterr().err
    assert status == 1
    assert f"{file} " in told
    assert message in told


def test_stored_scores_of_other_records_are_refused(recipe_file, dpo_keys, stored, runs, tmp_path, capsys):
    rows = (load_recipe(recipe_file, dpo_keys).datasets[0].path, tmp_path / "other.jsonl")
    with open(rows[0]) as old, rows[1].open("w") as new:
        new.writelines(old.readlines()[:-1])
    file = stored / "reference.safetensors"
    keys = ["reference=precomputed", f"reference_path={file}", f"datasets=[{{path: {rows[1]}}}]"]
    status, _ = runs("unused", *keys, f"output_dir={tmp_path}/run")
    assert status == 1
    assert f"{file} was computed from other records" in capsys.readouterr().err


# Another value for each recipe key. Left out: what names folders and files, and keys whose other values need a GPU.
OTHER_VALUES = {
    "model_name_or_path": [f"{ROOT}/tests/golden/llada21_tiny"],
    "mask_token_id": ["157"],
    "eos_token_id": ["155"],
    "max_length": ["32", "48"],
    "overlong": ["truncate"],
    "block_size": ["4"],
    "noise_range_low": ["0.2"],
    "noise_range_high": ["0.7"],
    "mask_count": ["exact noise_range_low=0 noise_range_high=1"],
    "num_views": ["2 row_length=480"],
    "stratified": ["true num_views=2 row_length=480"],
    "chat_template_path": [],
    "row_length": ["480"],
    "max_steps": ["2"],
    "per_device_train_batch_size": ["1"],
    "stage": [],
    "reference": [],
    "reference_path": [],
    "output_dir": [],
    "use_liger_kernel": [],
    "deepspeed": [f"{ROOT}/recipes/deepspeed/zero2.json"],
    "deepspeed_overrides": [],
    "datasets": [],
    "eval_datasets": [],
    "resume_from_checkpoint": [],
    "run_name": ["x"],
    "report_to": [],
    "eval_noise_levels": ["[0.5]"],
    "decode": [],
}


def other_values(field: dataclasses.Field, value) -> list[str]:
    """Overrides `name=...` that give a key another value."""
    if field.name in OTHER_VALUES:
        return [f"{field.name}={other}" for other in OTHER_VALUES[field.name]]
    if isinstance(value, bool):
        return [f"{field.name}={str(not value).lower()}"]
    if choices := field.metadata.get("choices"):
        return [f"{field.name}={choice}" for choice in choices if choice != value]
    if isinstance(value, int | float):
        return [f"{field.name}={value + 1}" if isinstance(value, int) else f"{field.name}={value / 2 or 0.01}"]
    return []


def scored(recipe, policy_of) -> tuple[dict, dict]:
    """What a stored reference knows of the first window, by (document, visit), and what the initial model says of it."""
    inputs = read_inputs(recipe)
    batches = make_source(recipe, inputs, rank=0, world_size=1).next_window()
    policy, known, elbos = policy_of(recipe), {}, {}
    for batch in batches:
        keys = [tuple(key) for key in stored_scores._keys(batch)]
        known |= dict(zip(keys, stored_scores.content_of(batch).tolist(), strict=True))
        with torch.no_grad():
            elbos |= dict(zip(keys, elbo(batch, policy(batch).logprob_N).reshape(-1, 2).tolist(), strict=True))
    return {"origin": stored_scores.origin_of(recipe, inputs.special), "content": known}, elbos


@pytest.mark.slow
def test_whatever_changes_a_score_is_known_to_the_stored_reference(recipe_file, dpo_keys):
    """Goes through all keys: where the initial model says something else of a pair, its origin or its digest differs."""
    keys, policies = [*dpo_keys, *SMALL, "reference=precomputed", "on_bad_row=skip", "max_bad_fraction=0.9"], {}

    def policy_of(recipe):
        chosen = (recipe.model_name_or_path, recipe.init_weights, recipe.dtype, recipe.seed)
        return policies.setdefault(chosen, load_initial(recipe))

    first = load_recipe(recipe_file, keys)
    known, elbos = scored(first, policy_of)
    tried, moved = set(), set()
    for field in dataclasses.fields(first):
        for override in other_values(field, getattr(first, field.name)):
            with contextlib.suppress(ConfigError):  # two keys that do not go together
                other, others = scored(load_recipe(recipe_file, [*keys, *override.split()]), policy_of)
                tried.add(field.name)
                both = elbos.keys() & others.keys()
                changed = [key for key in both if not numpy.allclose(elbos[key], others[key], atol=1e-4)]
                moved |= {field.name} if changed else set()
                for key in changed:
                    same = other["content"][key] == known["content"][key] and other["origin"] == known["origin"]
                    assert not same, f"{override} changes the scores of {key} in silence"
    assert len(tried) >= 60  # keys of other stages are refused
    own = {"beta", "loss_type", "label_smoothing", "length_normalize", "sft_loss_coef"}
    assert own <= tried, own - tried
    assert {"model_name_or_path", "mask_token_id", "eos_token_id", "block_size", "num_views", "seed"} <= moved


def test_a_digest_depends_on_nothing_else_in_the_batch(recipe_file, dpo_keys):
    """Alone in a row, or packed among others: the same number, and one that a single token changes."""

    def digests(*keys):
        recipe = load_recipe(recipe_file, [*dpo_keys, "max_steps=3", *keys])
        batch = make_source(recipe, read_inputs(recipe), rank=0, world_size=1).next_window()[0]
        return batch, dict(zip(map(tuple, stored_scores._keys(batch)), stored_scores.content_of(batch), strict=True))

    batch, packed = digests("per_device_train_batch_size=8")
    _, alone = digests("per_device_train_batch_size=8", "packing=false", "row_length=null")
    assert len(packed.keys() & alone.keys()) > 3
    assert all(packed[key] == alone[key] for key in packed.keys() & alone.keys())
    for index in batch.target_index_N[:3]:
        batch.input_ids_RS.view(-1)[index] += 1
    changed = stored_scores.content_of(batch) != numpy.array(list(packed.values()))
    assert 0 < changed.sum() <= 3


def test_other_documents_are_refused_where_they_are_met(recipe_file, dpo_keys):
    """The digest refuses what a header does not know of."""
    recipe = load_recipe(recipe_file, [*dpo_keys, *SMALL])
    batch = make_source(recipe, read_inputs(recipe), rank=0, world_size=1).next_window()[0]
    key_U, pairs = stored_scores._keys(batch), len(batch.document_id_D) // 2
    scores = stored_scores.Scores.sort(key_U, numpy.zeros((pairs, 2), numpy.float32), stored_scores.content_of(batch))
    reference = stored_scores.StoredReference(Path("x.safetensors"), {7: scores})
    assert reference(batch, 7).tolist() == [0.0] * (2 * pairs)
    batch.input_ids_RS.view(-1)[batch.target_index_N[0]] += 1
    with pytest.raises(
        CheckpointError, match=r"x\.safetensors was computed from other documents or views: those of docu"
    ):
        reference(batch, 7)


@pytest.mark.parametrize("content", [None, b"nonsense"])
def test_a_file_that_is_no_reference_is_refused(runs, tmp_path, capsys, content):
    file = tmp_path / "x.safetensors"
    if content is not None:
        file.write_bytes(content)
    status, _ = runs("unused", "reference=precomputed", f"reference_path={file}", f"output_dir={tmp_path}/run")
    assert status == 1
    assert f"{file} cannot be read as a precomputed reference" in capsys.readouterr().err


def test_a_reference_source_adds_a_column_and_keeps_the_cursor(recipe_file, dpo_keys):
    recipe = load_recipe(recipe_file, [*dpo_keys, *SMALL])
    source = make_source(recipe, read_inputs(recipe), rank=0, world_size=1)
    asked = []

    def reference(batch, data):
        asked.append(data)
        return batch.document_id_D.float()

    wrapped = ReferenceSource(source, reference)
    window = wrapped.next_window()
    assert [torch.equal(b.columns["reference_elbo_D"], b.document_id_D.float()) for b in window] == [True, True]
    assert asked == [source.examples.fingerprint] * 2
    assert wrapped.state_dict() == source.state_dict()
    assert wrapped.epoch == source.epoch > 0
    again = ReferenceSource(make_source(recipe, read_inputs(recipe), rank=0, world_size=1), reference)
    again.load_state_dict(wrapped.state_dict())
    expected, found = source.next_window(), again.next_window()
    assert [torch.equal(a.input_ids_RS, b.input_ids_RS) for a, b in zip(expected, found, strict=True)] == [True, True]


def test_the_sides_of_a_pair_share_their_noise(recipe_file, dpo_keys):
    """As far as both answers reach, the same positions behind the prompt are masked."""
    recipe = load_recipe(recipe_file, [*dpo_keys, *SMALL])
    batch = make_source(recipe, read_inputs(recipe), rank=0, world_size=1).next_window()[0]
    position_N = batch.position_ids_RS.flatten()[batch.target_index_N]
    for pair in range(len(batch.document_id_D) // 2):
        sides = [(batch.document_N == 2 * pair + side) & (batch.view_N == 1) for side in (0, 1)]
        both = min(int(batch.response_length_D[2 * pair + side]) for side in (0, 1)) + int(position_N[sides[0]].min())
        end = both // recipe.block_size * recipe.block_size
        chosen, rejected = ([p for p in position_N[side].tolist() if p < end] for side in sides)
        assert chosen == rejected


@pytest.mark.slow
def test_adapters_off_under_zero_3_on_two_processes(recipe_file, dpo_keys, run_jobs, runs, tmp_path):
    """LoRA on two sharded ranks against one whole rank, whose reference is a copy."""
    status, whole = runs("whole", "use_peft=true", "reference=copy")
    assert status == 0
    sharded = tmp_path / "sharded"
    keys = [ZERO[3], "use_peft=true", "gradient_accumulation_steps=1", f"output_dir={sharded}"]
    run_jobs(2, [(recipe_file, [*dpo_keys, *SMALL, *keys])])
    for name in ("loss", "rewards/margins", "eval/rewards/margins"):
        expected = torch.tensor(read_metrics(whole, name))
        torch.testing.assert_close(torch.tensor(read_metrics(sharded, name)), expected, rtol=0, atol=1e-4)
    assert read_metrics(sharded, "rewards/margins")[0] == 0
