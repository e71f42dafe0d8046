"""Families whose attention the block size chooses: null is full attention, a number block-causal, from recipe to decoder."""

import json
import shutil

import pytest
import torch

from dfactory.assembly import check_family
from dfactory.decoding import decode
from dfactory.errors import ConfigError
from dfactory.inference import Pipeline
from dfactory.models.families.base import FAMILIES
from dfactory.models.registry import full_attention, load_policy, trained_block_size
from dfactory.models.saving import save_policy
from dfactory.models.tiny import TINY_DIR
from dfactory.recipe import load_recipe
from dfactory.types import WHOLE
from dfactory.vocabulary import recipe_vocabulary
from tests.commands.conftest import ROOT, dfactory, write_records
from tests.decoding.uncached import block_causal_logits
from tests.families.cases import golden, policy_of

NAME = "a2d_qwen3"
RECIPE = ROOT / "recipes/quickstart/sft.yaml"


@pytest.fixture
def ids():
    expected = golden(NAME).expected
    return {name: expected[name] for name in ("mask_token_id", "eos_token_id")}


@pytest.mark.parametrize("trained, whole", [(None, True), (8, False), (WHOLE, True)])
def test_a_checkpoint_is_decoded_as_it_was_trained(tmp_path, ids, trained, whole):
    """Without a record, as its family's: these have full attention."""
    save_policy(policy_of(NAME), tmp_path, block_size=trained)
    assert full_attention(tmp_path) is whole
    pipeline = Pipeline(tmp_path, max_new_tokens=16, **ids)
    assert pipeline.rules.canvas is whole
    assert pipeline.aligned_block_size == (WHOLE if whole else 8)
    assert pipeline.rules.block_size == (16 if whole else 8)


def test_training_again_changes_the_record(tmp_path):
    """A model that was trained in blocks, and after that on whole documents."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    save_policy(policy_of(NAME), first, block_size=8)
    policy = Pipeline(first, mask_token_id=1, eos_token_id=2).policy
    save_policy(policy, second, block_size=WHOLE)
    assert json.loads((second / "generation_config.json").read_text())["block_size"] is None
    assert (trained_block_size(first), trained_block_size(second)) == (8, None)


def test_a_decode_key_says_it_where_no_record_does(ids):
    """The two decoders differ in what they see, so in what they write."""
    whole, blocks = (
        Pipeline(golden(NAME).directory, full_attention=full, block_size=8, **ids) for full in (True, False)
    )
    assert (whole.rules.canvas, blocks.rules.canvas) == (True, False)
    prompt = golden(NAME).expected["generations"][0]["prompt"]
    answers = [decode(pipeline.policy, [prompt], pipeline.rules)[0] for pipeline in (whole, blocks)]
    assert [answer.block_origin for answer in answers] == [len(prompt), 0]


def test_a_family_with_one_attention_refuses_the_other():
    said = "decode.full_attention true: a model of the family llada2 is always block-causal; leave the key out"
    with pytest.raises(ConfigError, match=said):
        Pipeline("tiny", full_attention=True)
    assert full_attention(TINY_DIR, False) is False


def test_recipes_choose_by_block_size(ids):
    model = [f"model_name_or_path={golden(NAME).directory}", *(f"{name}={value}" for name, value in ids.items())]
    for block_size, whole in ((8, False), ("null", True)):
        recipe = load_recipe(RECIPE, [*model, f"block_size={block_size}"])
        check_family(recipe)
        assert recipe_vocabulary(recipe).sees_whole_document is whole
    with pytest.raises(
        ConfigError, match=r"decode\.full_attention belongs to generate and eval: a recipe has one block_size"
    ):
        load_recipe(RECIPE, [*model, "decode.full_attention=true"])


@pytest.mark.parametrize("name", ["a2d", "llama", "qwen3", "qwen3_moe"])
def test_which_families_can_be_either(name):
    family = FAMILIES[name]
    assert family.sees_whole_document is None
    assert (family.has_full_attention(None), family.has_full_attention(4)) == (True, False)


@pytest.mark.slow
def test_a_run_on_whole_documents_is_decoded_on_a_canvas(tmp_path, ids):
    model = shutil.copytree(
        golden(NAME).directory,
        tmp_path / "model",
        ignore=shutil.ignore_patterns("forward.safetensors", "expected.json"),
    )
    records = write_records(tmp_path / "ids.jsonl", 8, 300)
    dfactory(
        "train",
        RECIPE,
        f"model_name_or_path={model}",
        "init_weights=pretrained",
        *(f"{name}={value}" for name, value in ids.items()),
        *(f"{name}=[{{path: {records}}}]" for name in ("datasets", "eval_datasets")),
        *("block_size=null", "max_length=32", "max_steps=1", "gradient_accumulation_steps=1", "deepspeed=null"),
        *("eval_decode_prompts=2", "decode.max_new_tokens=8", f"output_dir={tmp_path / 'run'}"),
    )
    pipeline = Pipeline(tmp_path / "run", max_new_tokens=4, eos_token_id=ids["eos_token_id"])
    assert (pipeline.rules.canvas, pipeline.rules.block_size) == (True, 4)
    assert len(pipeline.generate([[1, 2, 3]])[0].token_ids) <= 4


def test_the_qwen2_variant_computes_qwen2(tmp_path):
    """It has no golden files of its own: another family's checkpoint with Qwen2's modules, under this name."""
    source = golden("fast_dllm_v2")
    keys = json.loads((source.directory / "config.json").read_text()) | {"model_type": "a2d-qwen2"}
    for other in ("bd_size", "conplemenrary_mask"):
        del keys[other]
    (tmp_path / "config.json").write_text(json.dumps(keys))
    shutil.copyfile(source.directory / "model.safetensors", tmp_path / "model.safetensors")
    policy = load_policy(tmp_path, dtype="float32")
    assert policy.sees_whole_document is None
    logits = block_causal_logits(policy, source.input_ids[0], source.expected["block_size"])
    torch.testing.assert_close(logits, source.logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name, key", [("sdar", "block_size"), ("fast_dllm_v2", "bd_size")])
def test_a_trained_block_size_is_where_the_original_reads_it(name, key, tmp_path):
    """In config.json: the original code decodes in those blocks."""
    save_policy(policy_of(name), tmp_path, block_size=8)
    assert json.loads((tmp_path / "config.json").read_text())[key] == 8
    assert trained_block_size(tmp_path) == 8
