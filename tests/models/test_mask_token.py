"""The recipe's `mask_token`: which token is chosen, what the model is given for it, and what is refused by name."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dfactory.assembly import read_inputs
from dfactory.cli import main
from dfactory.errors import ConfigError, DataError
from dfactory.models.mask_token import MaskToken, Origin, append_rows
from dfactory.models.registry import load_policy
from dfactory.models.saving import save_policy
from dfactory.planning.memory import count_parameters
from dfactory.recipe import load_recipe
from dfactory.vocabulary import read_vocabulary, recipe_vocabulary
from tests.autoregressive import AFTER_TEXT, RESERVED, make_tokenizer, write_ar_model, write_cpt_recipe
from tests.models.conftest import GOLDEN_DIR

NOT_IN_TEMPLATE = ["<tool>", "<fill_pad>", "<reserved_1>", "<reserved_0>"]
NOTHING_FREE = ["<|user|>", "<|assistant|>"]  # beside BOS, EOS and PAD: 3 and 4; text is 5 to 260


def vocabulary_of(model, mask_token="auto", **options):
    return read_vocabulary(str(model), mask_token_id=None, eos_token_id=None, mask_token=mask_token, **options)


@pytest.mark.parametrize(
    "special, literal",
    [
        (RESERVED, "<reserved_1>"),  # the smaller id of the two
        (["<tool>", "<fill_pad>"], "<fill_pad>"),  # padding of something else before a token with a meaning
        (["<|user|>", "<|assistant|>", "<tool>"], "<tool>"),  # the template writes the others
        (["<|reserved_special_token_0|>", "<|empty|>"], "<|reserved_special_token_0|>"),
        (["<|user|>", "<|empty_output|>"], "<|empty_output|>"),
    ],
)
def test_a_reserved_token_is_chosen_by_its_name(tmp_path, special, literal):
    model = write_ar_model(tmp_path / "model", special)
    vocabulary = vocabulary_of(model)
    chosen = vocabulary.chosen_mask
    assert (chosen.literal, chosen.origin, chosen.new_rows) == (literal, Origin.RESERVED, 0)
    assert vocabulary.special.mask == vocabulary.tokenizer.mask_token_id == 3 + special.index(literal)
    assert vocabulary_of(model).chosen_mask == chosen
    assert vocabulary.encoder.encode_text(literal).count(chosen.id) == 0  # text never turns into it


def test_what_means_something_is_not_chosen(tmp_path):
    model = write_ar_model(tmp_path / "model")
    assert vocabulary_of(model, mask_is_not=[7]).chosen_mask.literal == "<reserved_0>"
    generation = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [1, 7]}))
    assert vocabulary_of(model).chosen_mask.literal == "<reserved_0>"
    (model / "own.jinja").write_text("<reserved_0>" + (model / "chat_template.jinja").read_text())
    own = {"chat_template_path": str(model / "own.jinja")}
    assert vocabulary_of(model, **own).chosen_mask.literal == "<fill_pad>"
    assert vocabulary_of(model, **own, token_ranges={"action": [6, 7]}).chosen_mask.literal == "<tool>"


def test_an_added_token_that_says_reserved_need_not_be_special(tmp_path):
    model = write_ar_model(tmp_path / "model", NOTHING_FREE, plain=["<think>", "<unused0>"])
    vocabulary = vocabulary_of(model)
    assert vocabulary.chosen_mask[:3] == (262, "<unused0>", Origin.RESERVED)
    assert 262 not in vocabulary.encoder.encode_text("<unused0>")


@pytest.mark.parametrize("special, spare", [(NOTHING_FREE, 3), (NOTHING_FREE, 0)])
def test_an_unused_row_or_a_new_one(tmp_path, special, spare):
    vocabulary = vocabulary_of(write_ar_model(tmp_path / "model", special, spare_rows=spare))
    origin, rows = (Origin.UNUSED, 0) if spare else (Origin.ADDED, 1)
    assert vocabulary.chosen_mask == MaskToken(261, "<|mask|>", origin, rows)
    assert (vocabulary.size, vocabulary.special.mask) == (261 + max(spare, 1), 261)
    assert vocabulary.encoder.encode_text("<|mask|>").count(261) == 0


def test_the_models_own_mask_stays(tmp_path):
    model = write_ar_model(tmp_path / "model")
    make_tokenizer([*RESERVED[:-1], "<|mask|>"]).save_pretrained(model)
    vocabulary = vocabulary_of(model)
    assert (vocabulary.chosen_mask, vocabulary.new_mask) == (MaskToken(8, "<|mask|>", Origin.OWN), None)
    with pytest.raises(
        ConfigError, match=r"mask_token <reserved_1>: the mask of the model in .* is <\|mask\|>; leave the"
    ):
        vocabulary_of(model, "<reserved_1>")
    (model / "generation_config.json").write_text(json.dumps({"mask_token_id": 7}))  # that a run of ours recorded
    assert vocabulary_of(model).chosen_mask.id == 7
    golden = read_vocabulary(str(GOLDEN_DIR / "families/dream"), mask_token_id=None, eos_token_id=1, mask_token="auto")
    assert golden.new_mask is None


@pytest.mark.parametrize(
    "named, expected",
    [
        ("<tool>", (5, "<tool>", Origin.NAMED, 0)),
        ("<mine>", (AFTER_TEXT, "<mine>", Origin.ADDED, 1)),
    ],
)
def test_a_token_by_its_text(tmp_path, named, expected):
    assert vocabulary_of(write_ar_model(tmp_path / "model"), named).chosen_mask == expected


def test_a_word_as_a_mask_is_warned_of_and_stays_a_word(tmp_path):
    model = write_ar_model(tmp_path / "model")
    vocabulary = vocabulary_of(model, "a")
    index = vocabulary.tokenizer.get_vocab()["a"]
    assert vocabulary.chosen_mask == (index, None, Origin.NAMED, 0)
    assert "is the ordinary token 'a'" in vocabulary.warnings[0]
    save_policy(load_policy(model, mask=vocabulary.new_mask), saved := _directory(tmp_path / "saved"))
    assert vocabulary_of(saved, None).special.mask == index
    assert (saved / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("named", ["<|end|>", "<|pad|>", "<|user|>"])
def test_a_token_with_another_meaning_is_refused(tmp_path, named):
    with pytest.raises(
        ConfigError, match=f"mask_token {named} has another meaning: .*mask_token to auto".replace("|", r"\|")
    ):
        vocabulary_of(write_ar_model(tmp_path / "model"), named)


def test_without_a_tokenizer_there_is_a_new_row(tmp_path):
    model = write_ar_model(tmp_path / "model")
    for file in model.glob("tokenizer*"):
        file.unlink()
    vocabulary = read_vocabulary(str(model), mask_token_id=None, eos_token_id=1, mask_token="auto")
    assert vocabulary.chosen_mask == MaskToken(AFTER_TEXT, None, Origin.ADDED, 1)
    with pytest.raises(ConfigError, match="has no tokenizer; set mask_token_id, or mask_token to auto"):
        vocabulary_of(model, "<reserved_0>")


def test_a_tokenizer_that_cannot_be_written_is_refused(tmp_path):
    model = write_ar_model(tmp_path / "model")
    backend = json.loads((model / "tokenizer.json").read_text())["model"]
    (model / "vocab.json").write_text(json.dumps(backend["vocab"]))
    (model / "merges.txt").write_text("#version: 0.2\n")
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "GPT2Tokenizer"}))
    (model / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"mask_token <mine>: .*without a tokenizer.json none can be added"):
        vocabulary_of(model, "<mine>")


# --- the row ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_row_is_the_mean_and_plain_transformers_reads_it(tmp_path, tied):
    model = write_ar_model(tmp_path / "model", NOTHING_FREE, tied=tied)
    mask = vocabulary_of(model).new_mask
    policy, before = load_policy(model, mask=mask), load_policy(model)
    ends, old = ([p.model.get_input_embeddings(), p.model.get_output_embeddings()] for p in (policy, before))
    for end, rows in zip(ends, old, strict=True):
        assert end.weight.shape[0] == 262
        assert end.weight[:261].equal(rows.weight)
        torch.testing.assert_close(end.weight[261], rows.weight.mean(dim=0))
    assert (ends[0].weight is ends[1].weight) is tied
    assert count_parameters(model, 1).total == sum(p.numel() for p in policy.parameters())

    save_policy(policy, saved := _directory(tmp_path / "saved"), block_size=4)
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)
    assert (plain.config.vocab_size, plain.config.tie_word_embeddings) == (262, tied)
    assert (tokenizer.mask_token, tokenizer.mask_token_id, len(tokenizer)) == ("<|mask|>", 261, 262)
    ids = torch.arange(5, 11)[None]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(ids).logits
        torch.testing.assert_close(plain(ids).logits[..., :261], logits)
    again = read_vocabulary(str(saved), mask_token_id=None, eos_token_id=None)  # no key is needed
    assert (again.special.mask, again.size) == (261, 262)
    load_policy(saved)


@pytest.mark.parametrize("special, spare", [(RESERVED, 0), (NOTHING_FREE, 2)])
def test_a_token_that_has_a_row_is_recorded(tmp_path, special, spare):
    model = write_ar_model(tmp_path / "model", special, spare_rows=spare)
    chosen = vocabulary_of(model).new_mask
    save_policy(load_policy(model, mask=chosen), saved := _directory(tmp_path / "saved"))
    tokenizer, config = AutoTokenizer.from_pretrained(saved), json.loads((saved / "config.json").read_text())
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == (chosen.literal, chosen.id)
    assert config["vocab_size"] == json.loads((model / "config.json").read_text())["vocab_size"]
    assert json.loads((saved / "generation_config.json").read_text())["mask_token_id"] == chosen.id
    assert vocabulary_of(saved).chosen_mask == (chosen.id, chosen.literal, Origin.OWN, 0)


def test_random_weights_have_the_row_too(tmp_path):
    model = write_ar_model(tmp_path / "model", NOTHING_FREE)
    policy = load_policy(model, mask=vocabulary_of(model).new_mask, init_weights="random")
    assert policy.model.get_input_embeddings().weight.shape[0] == policy.config.vocab_size == 262


def test_appending_leaves_the_random_numbers_alone(tmp_path):
    policy = load_policy(write_ar_model(tmp_path / "model"))
    torch.manual_seed(3)
    append_rows(policy.model, 2)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert drawn.equal(torch.rand(1))


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe_file(tmp_path):
    return write_cpt_recipe(tmp_path, write_ar_model(tmp_path / "model"))


@pytest.mark.parametrize(
    "keys, said",
    [
        (["mask_token_id=7"], "mask_token auto with mask_token_id 7: both say which token is the mask; set one"),
        (["mask_token=' x'"], "mask_token ' x' is no text of a token"),
        (["view_source=uniform", "complementary=false"], "mask_token auto with view_source uniform: there is no mask"),
    ],
)
def test_keys_that_do_not_go_together(recipe_file, keys, said):
    with pytest.raises(ConfigError, match=said):
        load_recipe(recipe_file, keys)


def test_lora_trains_no_new_row(tmp_path, recipe_file):
    assert recipe_vocabulary(load_recipe(recipe_file, ["use_peft=true"])).new_rows == 0
    full = write_ar_model(tmp_path / "full", NOTHING_FREE)
    recipe = load_recipe(recipe_file, ["use_peft=true", f"model_name_or_path={full}"])
    with pytest.raises(
        ConfigError, match=r"adds a row to the embedding, and LoRA .*export --model .* --mask-token auto"
    ):
        recipe_vocabulary(recipe)
    assert main(["export", "--model", str(full), "--mask-token", "auto", "--output", str(tmp_path / "with")]) == 0
    assert (
        recipe_vocabulary(load_recipe(recipe_file, ["use_peft=true", f"model_name_or_path={tmp_path / 'with'}"])).size
        == 262
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_a_record_that_holds_the_token_ends_with_file_and_line(tmp_path, recipe_file, streaming):
    rows = [{"input_ids": [9, 10, *extra, 11], "prompt_lengths": 1} for extra in ((), (7,))]
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = load_recipe(recipe_file, [f"datasets=[{{path: {tmp_path / 'ids.jsonl'}}}]", f"streaming={streaming}"])
    with pytest.raises(
        DataError, match=r"ids.jsonl:2.*input_ids\[2\] is the mask 7: only noise may put it there.*mask_token"
    ):
        read_inputs(recipe, streaming)


def test_check_tells_the_choice_and_counts_the_row(tmp_path, recipe_file, capsys):
    def check(*words: str) -> str:
        assert main(["check", str(recipe_file), *words]) == 0
        return " ".join(capsys.readouterr().out.split())

    assert "mask token <reserved_1>, id 7, a reserved token, in no template and in no record" in check()
    full = write_ar_model(tmp_path / "full", NOTHING_FREE)
    told, total = check(f"model_name_or_path={full}"), count_parameters(full, 1).total
    assert "mask token <|mask|>, id 261, on a new row of embedding and head, the mean of the others" in told
    assert f"P parameters {total:,}, T trained {total:,}" in told
    assert "V vocabulary 262" in told


def test_export_gives_a_mask_once(tmp_path, recipe_file, capsys):
    model, out = tmp_path / "model", tmp_path / "with"
    assert main(["export", "--model", str(model), "--mask-token", "auto", "--output", str(out)]) == 0
    assert "mask token: <reserved_1>, id 7" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(out).mask_token_id == 7
    assert main(["export", "--model", str(out), "--mask-token", "auto", "--output", str(tmp_path / "again")]) == 2
    assert "has a mask token, <reserved_1>, id 7, the model's own: leave --mask-token out" in capsys.readouterr().err


def test_a_conversion_meets_no_needless_warning(tmp_path, recipe_file, capsys):
    """The rate and a template without markers are usual there; a mask without a gradient is not."""

    def check(*words: str) -> str:
        assert main(["check", str(recipe_file), "learning_rate=1e-3", *words]) == 0
        return " ".join(capsys.readouterr().out.split())

    told = check()
    assert "learning_rate" not in told.partition("warning:")[2]
    assert "no {% generation %} markers; both of two were" in told
    assert "no {% generation %} markers" not in told.partition("warning:")[2]
    assert "the mask 2 is the pad_token_id of config.json" in check("mask_token=null", "mask_token_id=2")


def test_data_tools_read_a_model_without_a_mask(tmp_path, recipe_file, capsys):
    assert main(["data", "validate", str(tmp_path / "chats.jsonl"), "--model", str(tmp_path / "model")]) == 0
    assert main(["data", "preview", str(tmp_path / "chats.jsonl"), "--model", str(tmp_path / "model")]) == 0
    assert "it is 0" in capsys.readouterr().out


def test_uniform_noise_has_no_mask_to_choose():
    directory = str(GOLDEN_DIR / "families/diffusion_gemma")
    keys = {"mask_token_id": None, "eos_token_id": 1}
    assert read_vocabulary(directory, mask_token="auto", **keys).new_mask is None
    with pytest.raises(ConfigError, match=r"mask_token <x>: .* has uniform noise and no mask; leave the key out"):
        read_vocabulary(directory, mask_token="<x>", **keys)


def _directory(path):
    path.mkdir()
    return path
