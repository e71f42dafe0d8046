"""The embedded model's files and the quickstart's records: do they fit each other, and do their scripts remake them?"""

import dataclasses
import json
import re
from collections import Counter

import pytest
from transformers import AutoTokenizer

from data_tools import make_base_corpus, make_quickstart_data, make_quickstart_pairs, quickstart_table, train_tokenizer
from dfactory.commands.quickstart_table import FORMATS, read_expected
from dfactory.commands.recipes import recipes_folder
from dfactory.models.registry import load_policy, trained_block_size
from dfactory.models.tiny import TINY_DIR, embedded_config, tiny_config, write_tiny_config

DATA = train_tokenizer.RECORDS.parent
GOLDEN_CONFIG = train_tokenizer.REPOSITORY / "tests" / "golden" / "llada2_tiny" / "config.json"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_DIR, local_files_only=True)


@pytest.fixture(scope="module")
def records():
    return {
        name: [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("train", "heldout")
    }


def prompts(rows):
    return [row["messages"][0]["content"] for row in rows]


# --- configuration


def test_config_has_the_keys_of_the_original(tokenizer):
    config = embedded_config()
    assert set(config) == set(json.loads(GOLDEN_CONFIG.read_text()))
    assert config["model_type"] == "llada2_moe"
    assert config["vocab_size"] % 64 == 0
    assert 0 <= config["vocab_size"] - len(tokenizer) < 64
    assert config["pad_token_id"] == tokenizer.pad_token_id
    assert config["max_position_embeddings"] == tokenizer.model_max_length


def test_tiny_config_refuses_a_key_that_llada2_does_not_have():
    assert tiny_config(num_experts=4)["num_experts"] == 4
    with pytest.raises(TypeError, match="num_expert;"):
        tiny_config(num_expert=4)


def test_write_tiny_config(tmp_path):
    directory = write_tiny_config(tmp_path / "model", hidden_size=32)
    assert json.loads((directory / "config.json").read_text()) == tiny_config(hidden_size=32)


# --- tokenizer


@pytest.mark.parametrize(
    "text",
    [
        "Reverse the letters: s t o n e",
        "  spaces  before\tand\n\nbehind  ",
        "naïve café, Größe, 日本語, العربية, 🦊👩‍🚀, e\u0301",
        "don't 1,234.56 \u0000\u200b\ufeff x",
        "",
    ],
)
def test_any_text_survives(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_special_tokens_are_single_and_last(tokenizer):
    ids = [tokenizer.encode(token, add_special_tokens=False) for token in train_tokenizer.SPECIAL_TOKENS]
    assert ids == [[len(tokenizer) - 6 + index] for index in range(6)]
    assert set(tokenizer.all_special_tokens) == set(train_tokenizer.SPECIAL_TOKENS)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.mask_token == "<|mask|>"
    assert tokenizer.encode("a") == tokenizer.encode("a", add_special_tokens=False)


def test_a_special_token_spelled_by_a_user_can_stay_text(tokenizer):
    text = "say <|mask|> and </role>"
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert max(ids) < tokenizer.convert_tokens_to_ids("<|startoftext|>")
    assert tokenizer.decode(ids) == text


def test_letters_and_digits_are_single_tokens(tokenizer):
    assert tokenizer.tokenize("STONE 1234567890") == [*"STONE", "Ġ", *"1234567890"]
    assert tokenizer.tokenize("Reverse the letters: STONE")[-6:] == [":Ġ", *"STONE"]
    assert tokenizer.tokenize("12, 3") == ["1", "2", ",Ġ", "3"]


def test_a_word_is_the_same_token_anywhere_in_a_list(tokenizer):
    assert tokenizer.tokenize("Reverse the list: red, bear, sun")[-5:] == ["red", ",Ġ", "bear", ",Ġ", "sun"]
    assert tokenizer.tokenize("red, sun") == ["red", ",Ġ", "sun"]


def test_answers_in_capitals_are_single_letters(tokenizer, records):
    lettered = {"reverse_letters", "sort_letters"}
    answers = [row["answer"] for rows in records.values() for row in rows if row["task"] in lettered]
    assert answers
    assert all(tokenizer.tokenize(answer) == list(answer) for answer in answers)


# --- chat template


def test_chat_template_marks_every_assistant_turn(tokenizer):
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a b"},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "c"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == (
        "<role>SYSTEM</role>s<|role_end|><role>HUMAN</role>q<|role_end|><role>ASSISTANT</role>a b<|role_end|>"
        "<role>HUMAN</role>r<|role_end|><role>ASSISTANT</role>c<|role_end|>"
    )
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    marked = [token for token, trainable in pairs if trainable]
    assert tokenizer.convert_ids_to_tokens(marked) == ["a", "Ġb", "<|role_end|>", "c", "<|role_end|>"]


def test_generation_prompt_is_what_training_puts_before_an_answer(tokenizer):
    asked = [{"role": "user", "content": "q"}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert prompt == "<role>HUMAN</role>q<|role_end|><role>ASSISTANT</role>"
    whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": "a"}], tokenize=False)
    assert whole == prompt + "a<|role_end|>"


def test_chat_template_refuses_an_unknown_role(tokenizer):
    with pytest.raises(Exception, match="role narrator is unknown"):
        tokenizer.apply_chat_template([{"role": "narrator", "content": "x"}], tokenize=False)


# --- records


def test_records_have_one_shape_and_are_short(tokenizer, records):
    for row in records["train"] + records["heldout"]:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert row["messages"][1]["content"] == row["answer"] != ""
        assert set(row) == {"messages", "answer", "task"}
    lengths = [len(tokenizer.apply_chat_template(row["messages"])["input_ids"]) for row in records["train"]]
    assert max(lengths) <= 64


def test_heldout_prompts_are_not_trained_on(records):
    assert not set(prompts(records["train"])) & set(prompts(records["heldout"]))
    assert max(Counter(prompts(records["train"])).values()) == 1
    assert max(Counter(prompts(records["heldout"])).values()) == 1
    assert {row["task"] for row in records["train"]} == {row["task"] for row in records["heldout"]}


def test_a_heldout_problem_is_not_trained_on_in_another_wording():
    """Every wording is replaced by a bare list of its fields, so that the problem itself is what is compared."""
    for task in make_quickstart_data.TASKS:
        fields = re.findall(r"{\w+}", task.wordings[0])
        bare = dataclasses.replace(task, wordings=(" | ".join(sorted(fields)),) * len(task.wordings))
        trained, kept = make_quickstart_data.records_of(bare, 100, 20, seed=1)
        assert len(kept) == 20
        assert not set(prompts(trained)) & set(prompts(kept))


# --- the scripts


def test_records_are_remade_byte_for_byte(tmp_path):
    assert make_quickstart_data.main(["--output", str(tmp_path)]) == 0
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


def test_pairs_are_remade_byte_for_byte(tmp_path):
    assert make_quickstart_pairs.main(["--output", str(tmp_path)]) == 0
    for name in ("pairs_train.jsonl", "pairs_heldout.jsonl", "preferred_train.jsonl", "preferred_heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


def test_pairs_prefer_one_reading_of_open_requests(records):
    """Sorted letters, say, unless the request says otherwise; a subject stays on one side."""
    pairs = {
        name: [json.loads(line) for line in (DATA / f"pairs_{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("train", "heldout")
    }
    assert {name: len(rows) for name, rows in pairs.items()} == {"train": 1500, "heldout": 200}
    subjects = {name: {row["subject"] for row in rows} for name, rows in pairs.items()}
    assert not subjects["train"] & subjects["heldout"]
    asked = {row["messages"][0]["content"].partition(": ")[2].rstrip("?") for row in records["heldout"]}
    assert not asked & (subjects["train"] | subjects["heldout"])
    letters = [row for row in pairs["train"] if row["task"] == "order_letters"]
    assert len(letters) > 500
    for row in letters:
        answers = ["".join(sorted(row["subject"])), row["subject"][::-1]]
        backwards = re.match("Reverse|Write backwards|Spell from the end", row["prompt"][0]["content"])
        assert [row[side][0]["content"] for side in ("chosen", "rejected")] == (answers[::-1] if backwards else answers)


def test_another_seed_gives_other_records(tmp_path):
    for seed in ("1", "2"):
        counts = ["--train", "28", "--heldout", "14"]
        make_quickstart_data.main(["--output", str(tmp_path / seed), "--seed", seed, *counts])
    assert (tmp_path / "1" / "train.jsonl").read_bytes() != (tmp_path / "2" / "train.jsonl").read_bytes()
    assert len((tmp_path / "1" / "train.jsonl").read_text().splitlines()) == 28


def test_more_records_than_problems_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="ask for fewer"):
        make_quickstart_data.main(["--output", str(tmp_path), "--train", "100000"])


def test_equal_records_give_equal_tokenizers(tmp_path):
    for name in ("one", "other"):
        assert train_tokenizer.main(["--output", str(tmp_path / name)]) == 0
    one, other = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("one", "other"))
    assert one == other


def test_the_base_corpus_keeps_held_out_problems_out(tmp_path, records):
    for name in ("one", "other"):
        assert make_base_corpus.main(["--output", str(tmp_path / name), "--documents", "3000"]) == 0
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    documents = [json.loads(line) for line in (tmp_path / "one").read_text().splitlines()]
    assert len(documents) == 3000
    questions = {row["messages"][0]["content"] for row in records["heldout"]}
    assert not questions & {document["prompt"].strip() for document in documents}


def test_the_embedded_model_is_whole():
    """Weights of at most 12 MB, in bfloat16, with the block size that they were trained with."""
    assert (TINY_DIR / "model.safetensors").stat().st_size <= 12_000_000
    assert trained_block_size(TINY_DIR) == 16
    policy = load_policy("tiny", dtype="auto")
    assert sum(p.numel() for p in policy.parameters()) > 1_200_000


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_quickstart_table(tmp_path, capsys):
    sweep = {"exact_match": 0.75, "tokens_per_forward": 3.25, "tokens_per_second": 1500.0}
    for stage, metrics in (("sft", {"loss": 3.0}), ("dpo", {"eval/rewards/accuracies": 0.875})):
        run = tmp_path / stage
        run.mkdir()
        (run / "config.yaml").write_text(f"stage: {stage}\n")
        write_lines(run / "metrics.jsonl", [{"step": 1} | metrics])
        write_lines(
            run / "thresholds.jsonl", [sweep | {"threshold": 0.5, "exact_match": 0.1}, sweep | {"threshold": 0.9}]
        )
        write_lines(run / "preferred.jsonl", [{"answer": "b a", "text": " b a\n"}, {"answer": "b", "text": "c"}])
    runs = [str(tmp_path / "sft"), str(tmp_path / "dpo")]
    assert quickstart_table.main([*runs, "--write", str(tmp_path / "numbers.json")]) == 0
    shown = capsys.readouterr().out
    for number in ("75.0%", "3.25", "1,500", "0.500", "87.5%"):
        assert number in shown
    written = json.loads((tmp_path / "numbers.json").read_text())
    assert written["dpo"]["preference accuracy"] == 0.875
    assert "preference accuracy" not in written["sft"]


def test_quickstart_table_names_a_missing_file(tmp_path):
    with pytest.raises(SystemExit, match=r"config\.yaml does not exist"):
        quickstart_table.main([str(tmp_path)])


def test_expected_numbers_are_those_of_the_stages():
    expected = read_expected(recipes_folder())
    assert list(expected) == ["sft", "cap", "dpo", "rl"]
    for numbers in expected.values():
        assert set(numbers) <= set(FORMATS)
