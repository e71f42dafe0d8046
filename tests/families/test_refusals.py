"""What a model and its recipe cannot do together is refused by the command line, with the key, the value, the rule and what
to do."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dfactory.cli import main
from dfactory.errors import ConfigError
from dfactory.models.families.base import FAMILIES, Attention, Family
from tests.batches import TINY_SIZES
from tests.commands.conftest import write_recipe
from tests.families.cases import FOLDER

ROW = TINY_SIZES | {"tie_word_embeddings": False}


@pytest.fixture
def folder(tmp_path) -> Path:
    """With a Llama of random weights in `model`."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**ROW)).save_pretrained(tmp_path / "model")
    return tmp_path


def config(folder: Path, **keys) -> dict:
    """Replace keys of config.json. Returns keys of the recipe, none here."""
    file = folder / "model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    return {}


def another_config(folder: Path, **keys) -> dict:
    (folder / "model/config.json").write_text(json.dumps(keys))
    return {}


def original(folder: Path, name: str, **keys) -> dict:
    """A checkpoint of another family instead, from the golden files."""
    shutil.rmtree(folder / "model")
    ignored = shutil.ignore_patterns("forward.safetensors", "expected.json")
    shutil.copytree(FOLDER / name, folder / "model", ignore=ignored)
    return keys


def tokenizer(folder: Path, words: int, **special: str) -> None:
    """A tokenizer of so many words, w0, w1, ..., next to the model."""
    vocabulary = {f"w{n}": n for n in range(words)}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="w0")), unk_token="w0", eos_token="w1", **special
    )
    fast.save_pretrained(folder / "model")


def without_a_layer(folder: Path) -> dict:
    file = folder / "model/model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "layers.1.mlp" not in name}, file)
    return {}


def without_a_shard(folder: Path) -> dict:
    tensors = load_file(folder / "model/model.safetensors")
    (folder / "model/model.safetensors").rename(folder / "model/model-00001-of-00002.safetensors")
    names = dict.fromkeys(tensors, "model-00001-of-00002.safetensors") | {
        "lm_head.weight": "model-00002-of-00002.safetensors"
    }
    (folder / "model/model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return {}


def llada_with_words(folder: Path) -> dict:
    keys = original(folder, "llada", block_size=None)
    tokenizer(folder, 320)
    return keys


def dream_with_another_mask(folder: Path) -> dict:
    keys = original(folder, "dream", block_size=None)
    tokenizer(folder, 320, mask_token="w5")
    return keys


CASES = {
    "architecture": (
        lambda folder: config(folder, model_type="made_up"),
        "model_type 'made_up' in .*config.json is not a known family: .*llada2_moe.* a new one is a file in",
    ),
    "window": (
        lambda folder: another_config(folder, **TINY_SIZES, model_type="mistral", sliding_window=64),
        "sliding_window 64 in .*config.json is not supported: block diffusion attends to the whole clean past, and with "
        "max_position_embeddings 256 the window hides part of it; take a model of full attention",
    ),
    "state-space": (
        lambda folder: another_config(folder, model_type="mamba"),
        "layer_types with linear_attention in .*config.json is not supported: .* take a model of full_attention layers",
    ),
    "encoder-decoder": (
        lambda folder: config(folder, model_type="t5", is_encoder_decoder=True),
        "is_encoder_decoder True in .*config.json is not supported: .* take a decoder-only checkpoint",
    ),
    "mask of a family": (
        lambda folder: original(folder, "dream", block_size=None, mask_token_id=5),
        "mask_token_id 5: the mask of the dream model in .* is 318; leave the key out",
    ),
    "mask outside": (
        lambda folder: {"mask_token_id": 96},
        "mask_token_id 96 is no token of the model: it must be below the model's vocabulary size 96",
    ),
    "mask below 0": (
        lambda folder: {"mask_token_id": -1},
        "mask_token_id -1 is no token of the model: it must be 0 or more",
    ),
    "mask is EOS": (
        lambda folder: {"mask_token_id": 94},
        "mask_token_id 94 equals eos_token_id 94",
    ),
    "no mask": (
        lambda folder: {"mask_token_id": None},
        "mask_token_id is null and there is no tokenizer: set mask_token_id",
    ),
    "ids beyond the vocabulary": (
        lambda folder: tokenizer(folder, 120) or {},
        "the tokenizer in .* is another model's, or the embeddings were not resized for it: its ids go up to 119, and .*"
        "config.json states a vocabulary of 96; put the model's own tokenizer there",
    ),
    "the family's ids are text": (
        llada_with_words,
        r"the tokenizer in .* is another model's: \d+, the mask of the family llada, is the text 'w\d+' in it; put the",
    ),
    "another mask": (
        dream_with_another_mask,
        "the tokenizer in .* is another model's: its mask 'w5' is 5, and that of the family dream 318; put the model's own",
    ),
    "blocks with full attention": (
        lambda folder: original(folder, "dream", mask_token_id=None),
        "block_size 8: the model family dream has full attention, in which a document has no blocks; set block_size to null",
    ),
    "no blocks with block-causal": (
        lambda folder: {"model_name_or_path": "tiny", "block_size": None, "mask_token_id": None, "eos_token_id": None},
        "block_size null: a model of the family llada2 is block-causal; set block_size",
    ),
    "kernels for other modules": (
        lambda folder: another_config(folder, **TINY_SIZES, model_type="mistral") | {"use_liger_kernel": True},
        "use_liger_kernel true: no family declares the model_type mistral, .* set it to false",
    ),
    "preferences without a mask": (
        lambda folder: original(folder, "diffusion_gemma", stage="dpo", mask_token_id=None),
        "stage dpo: the model family diffusion_gemma has uniform noise instead of a mask, .* an algorithm that learns from "
        "records",
    ),
    "masks for a family without": (
        lambda folder: original(folder, "diffusion_gemma", mask_token_id=None),
        "view_source mask: the model family diffusion_gemma was trained with uniform noise; set view_source to uniform",
    ),
    "half a checkpoint": (without_a_layer, r"missing tensor model\.layers\.1\.mlp\.down_proj\.weight \[32, 64\]"),
    "a shard is missing": (without_a_shard, "lacks model-00002-of-00002.safetensors, which .*index.json names"),
    "more layers than stored": (
        lambda folder: config(folder, num_hidden_layers=5),
        "does not fit its config.json: num_hidden_layers is 5, but the weights hold 2",
    ),
    "other widths than stored": (
        lambda folder: config(folder, intermediate_size=80),
        r"tensor model.layers.0.mlp.\w+.weight has shape",
    ),
}


@pytest.mark.parametrize("change, said", CASES.values(), ids=CASES)
def test_refused_by_the_command_line(folder, change, said, capsys):
    keys = change(folder)
    recipe = write_recipe(folder, folder / "model", vocabulary=90, mask=95, eos=94, **keys)
    status = main(["check", str(recipe)])
    printed = capsys.readouterr()
    assert status != 0
    told = " ".join((printed.out + printed.err).split())
    assert re.search(said, told), told


@pytest.mark.parametrize(
    "facts, said",
    [
        ({"logit_shift": 2}, "model family odd: logit_shift 2; it is 0 or 1"),
        (
            {"attention": Attention.FULL},
            "model family odd: block_size 32 with full attention; None belongs to full attention",
        ),
        ({"block_size": None}, "model family odd: block_size None with block-causal attention"),
    ],
)
def test_facts_that_no_family_can_have(facts, said):
    declared = FAMILIES.names
    with pytest.raises(ConfigError, match=said):
        Family("odd", (), {}, **facts)
    assert FAMILIES.names == declared
