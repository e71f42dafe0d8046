"""A model with full attention and shifted logits through the verbs: train, generate, eval, export; what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from dfactory.assembly import check_family, make_eval_source, make_source, read_inputs
from dfactory.errors import ConfigError
from dfactory.recipe import load_recipe
from dfactory.types import PADDING
from dfactory.vocabulary import recipe_vocabulary
from tests.commands.conftest import ROOT, dfactory, write_records
from tests.families.cases import FOLDER

RECIPE = ROOT / "recipes/dream/sft.yaml"
ROLLOUTS = [
    "stage=rl",
    "reward_funcs=[exact_match]",
    "loss_weight=uniform",
    "decode.temperature=1",
    "decode.acceptance=top",
]


@pytest.fixture
def keys(tmp_path):
    """Overrides of the recipe: the tiny checkpoint, tokenised records, three steps."""
    records = write_records(tmp_path / "ids.jsonl", 20, 300)
    ignored = shutil.ignore_patterns("forward.safetensors", "expected.json")
    model = shutil.copytree(FOLDER / "dream", tmp_path / "model", ignore=ignored)
    data = [f"{name}=[{{path: {records}}}]" for name in ("datasets", "eval_datasets")]
    sizes = ["max_length=32", "dtype=float32", "deepspeed=null", "gradient_checkpointing=false", "warmup_steps=0"]
    decode = ["eval_decode_prompts=2", "decode.max_new_tokens=8", "decode.threshold=0.3"]
    run = ["max_steps=3", "gradient_accumulation_steps=1", "learning_rate=0.01", f"output_dir={tmp_path / 'run'}"]
    return [f"model_name_or_path={model}", *data, *sizes, *decode, *run]


@pytest.mark.slow
def test_through_the_verbs(keys, tmp_path):
    run, out = tmp_path / "run", tmp_path / "answers.jsonl"
    dfactory("train", RECIPE, *keys)
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in losses] == [1, 2, 3, 3]
    assert losses[-1]["eval/tokens_per_forward"] > 0

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_ids": list(range(1, n))}) + "\n" for n in (4, 9)))
    timed = ["decode.rule=timed", "decode.time_steps=6", "decode.max_new_tokens=12"]
    dfactory("generate", "--model", run, "--input", prompts, "--output", out, *timed)
    assert [json.loads(line)["forwards"] for line in out.read_text().splitlines()] == [6, 6]
    dfactory("eval", "--model", run, "--data", tmp_path / "ids.jsonl", "--elbo-pairs", 2)

    traces = tmp_path / "traces.jsonl"
    blocks = ["decode.block_size=4", "decode.max_new_tokens=12", "decode.threshold=0.3"]
    dfactory("generate", "--keep-trace", "--model", run, "--input", prompts, "--output", traces, *blocks)
    again = ["view_source=trace", "loss_weight=elbo", f"datasets=[{{path: {traces}}}]", "max_steps=1"]
    dfactory("train", RECIPE, *keys, *again, f"output_dir={tmp_path / 'traced'}")
    assert json.loads((tmp_path / "traced/metrics.jsonl").read_text().splitlines()[0])["targets"] > 0

    dfactory("export", "--model", run, "--output", tmp_path / "exported")
    exported, source = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "exported", tmp_path / "model")
    )
    assert exported.keys() == source.keys()
    assert any(not exported[name].equal(source[name]) for name in source)


@pytest.mark.parametrize(
    "changed, said",
    [
        (
            ["block_size=32", "loss_weight=elbo"],
            "block_size 32: the model family dream has full attention, .* set block_size to null",
        ),
        (["model_name_or_path=tiny"], "block_size null: a model of the family llada2 is block-causal; set block_size"),
    ],
)
def test_keys_without_a_meaning_are_refused(keys, changed, said):
    with pytest.raises(ConfigError, match=said):
        check_family(load_recipe(RECIPE, [*keys, *changed]))


def test_documents_are_filled_with_eos_that_is_trained(keys):
    """In training and evaluation, by `eos_fill`; the report of the records counts the fill."""
    plain, filled = (load_recipe(RECIPE, [*keys, *more]) for more in ([], ["eos_fill=16"]))
    inputs = read_inputs(filled)
    assert inputs.train.report.aligned_tokens % 16 == 0
    for recipe in (plain, filled):
        for make in (make_source, make_eval_source):
            (batch, *_) = make(recipe, inputs, 0, 1).next_window()
            fill_D = batch.response_length_D - batch.answer_length_D
            assert bool((fill_D > 0).any()) == (recipe is filled)
            length_D = torch.bincount(batch.document_RS[batch.document_RS != PADDING])
            assert (length_D % 16 == 0).all() == (recipe is filled)


@pytest.mark.parametrize(
    "changed, said",
    [
        (["eos_fill=24"], "eos_fill 24 does not divide max_length 32"),
        (
            ["eos_fill=16", "block_size=16"],
            "eos_fill 16 with block_size 16: documents are filled to whole blocks anyway",
        ),
        (["eos_fill=16", "view_source=trace"], "eos_fill 16 with view_source trace"),
        (["eos_fill=16", *ROLLOUTS], "eos_fill 16 with stage rl: rollouts are as long as their canvas"),
    ],
)
def test_fill_without_a_meaning_is_refused(keys, changed, said):
    with pytest.raises(ConfigError, match=said):
        load_recipe(RECIPE, [*keys, *changed])


def test_special_ids_are_the_familys(keys, tmp_path):
    assert recipe_vocabulary(load_recipe(RECIPE, keys)).special[:2] == (318, 312)
    with pytest.raises(
        ConfigError, match=r"mask_token_id 300: the mask of the dream model in .* is 318; leave the key out"
    ):
        recipe_vocabulary(load_recipe(RECIPE, [*keys, "mask_token_id=300"]))
