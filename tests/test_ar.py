"""benchmarks/ar.py on a Llama of random weights: the same records as dfactory's training, exact scores, greedy answers."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks import ar, ar_answers, ar_scores, ar_training, autoregressive
from dfactory.assembly import make_source, read_inputs
from dfactory.cli import main
from dfactory.errors import ConfigError
from dfactory.models.saving import carried_files
from dfactory.models.tiny import TINY_DIR
from dfactory.recipe import Recipe, load_recipe
from tests.batches import TINY_SIZES
from tests.test_assets import DATA

RECIPE = DATA.parent / "sft.yaml"
KEYS = ["max_steps=3", "row_length=320", "learning_rate=0.01", "warmup_steps=0", "eval_datasets=[]"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A Llama of random weights with the embedded tokenizer."""
    directory = tmp_path_factory.mktemp("llama")
    keys = json.loads((TINY_DIR / "config.json").read_text())
    torch.manual_seed(0)
    sizes = TINY_SIZES | {"vocab_size": keys["vocab_size"], "initializer_range": 0.2}
    LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).save_pretrained(directory)
    for file in carried_files(TINY_DIR):
        if file.name not in ("config.json", "generation_config.json"):
            shutil.copyfile(file, directory / file.name)
    return directory


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    """Records of several tasks and lengths."""
    file = tmp_path_factory.mktemp("records") / "heldout.jsonl"
    lines = (DATA / "heldout.jsonl").read_text().splitlines(keepends=True)
    file.write_text("".join(lines[::20]))
    return file


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> list[str]:
    """Of a recipe of three steps on some records of the quickstart."""
    file = tmp_path_factory.mktemp("records") / "train.jsonl"
    file.write_text("".join((DATA / "train.jsonl").read_text().splitlines(keepends=True)[:60]))
    return [*KEYS, f"datasets=[{{path: {file}}}]"]


def by_hand(model: Path, data: Path) -> list[float]:
    """The log-probability of each record's answer and EOS, one at a time, by transformers' own forward."""
    network = AutoModelForCausalLM.from_pretrained(model).double()
    tokenizer = autoregressive.vocabulary_of(model).tokenizer
    sums = []
    for row in map(json.loads, data.read_text().splitlines()):
        prompt = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(row["messages"], return_dict=False)
        assert whole[: len(prompt)] == prompt
        whole = whole if whole[-1] == tokenizer.eos_token_id else [*whole, tokenizer.eos_token_id]
        logits = network(torch.tensor([whole])).logits[0].log_softmax(-1)
        sums.append(sum(logits[at - 1, whole[at]].item() for at in range(len(prompt), len(whole))))
    return sums


def words_of(model: Path, output: Path, keys: list[str]) -> list[str]:
    return ["train", str(RECIPE), "--model", str(model), "--output", str(output), *keys]


def recipe_of(model: Path, keys: list[str]) -> Recipe:
    return load_recipe(RECIPE, [*keys, f"model_name_or_path={model}"])


def test_a_step_has_the_records_and_response_tokens_of_dfactorys_own(model, keys):
    recipe = load_recipe(RECIPE, keys)
    source = make_source(recipe, read_inputs(recipe), 0, 1)
    plan = ar_training.make_plan(recipe_of(model, keys), None)
    assert len(plan.steps) == 3
    for step, units in enumerate(plan.steps):
        (batch,) = source.next_window()
        assert sorted(plan.texts[unit].document_id for unit in units) == sorted(batch.document_id_D.tolist())
        assert plan.positions_of(step) == batch.answer_length_D.sum()


def test_positions_end_a_run(model, keys):
    recipe = recipe_of(model, keys)
    whole = ar_training.make_plan(recipe, None)
    wanted = whole.positions_of(0) + 1
    assert ar_training.make_plan(recipe, wanted).steps == whole.steps[:2]


def test_training_lowers_the_loss_goes_on_where_it_stopped_and_is_not_repeated(model, keys, tmp_path, capsys):
    assert ar.main(words_of(model, tmp_path / "whole", keys)) == 0
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    assert not (tmp_path / "whole/state.pt").exists()

    recipe = recipe_of(model, keys)
    plan, stopped = ar_training.make_plan(recipe, None), tmp_path / "stopped"
    stopped.mkdir()
    run = ar_training.Training(recipe, plan, autoregressive.read_model(model), stopped, batch_tokens=2048)
    run.step(0)
    run.save()
    run.step(1)  # lost
    assert ar.main(words_of(model, stopped, keys)) == 0
    found, expected = (load_file(folder / "model.safetensors") for folder in (stopped, tmp_path / "whole"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    resumed = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in resumed] == [row["loss"] for row in rows]

    capsys.readouterr()
    assert ar.main(words_of(model, stopped, keys)) == 0
    assert "is complete" in capsys.readouterr().out
    assert ar.main(words_of(model, stopped, [*keys, "learning_rate=0.02"])) == 2
    assert "was trained with learning_rate 0.01, and this is 0.02" in capsys.readouterr().err


def test_the_loss_is_the_mean_over_response_tokens_in_any_micro_batches(model, keys, tmp_path):
    recipe = recipe_of(model, keys)
    plan = ar_training.make_plan(recipe, None)
    losses = []
    for tokens in (1, 64, 2048):
        run = ar_training.Training(recipe, plan, autoregressive.read_model(model), tmp_path, batch_tokens=tokens)
        losses.append([run.step(0)["loss"], run.step(1)["loss"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)


def test_a_score_is_the_sum_of_log_softmax_by_hand(model, held_out):
    lines = ar_scores.score_file(model, held_out)
    expected = by_hand(model, held_out)
    assert [line["logprob"] for line in lines] == pytest.approx(expected, abs=1e-3)
    assert len({line["task"] for line in lines}) > 3


def test_scored_tokens_are_those_of_the_elbo(model, held_out, tmp_path, capsys):
    """At a block size with fill; another file's ELBO is refused."""
    elbo, output = tmp_path / "elbo.jsonl", tmp_path / "scores.jsonl"
    words = ["eval", "--model", "tiny", "--elbo-pairs", "1", "--output", str(elbo), "decode.block_size=16"]
    assert main([*words, "--data", str(held_out)]) == 0
    bounds = [json.loads(line) for line in elbo.read_text().splitlines()]
    assert sum(line["fill"] for line in bounds) > 0
    score = ["score", "--model", str(model), "--data", str(held_out), "--output", str(output), "--elbo", str(elbo)]
    assert ar.main(score) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [line["tokens"] for line in bounds]
    gap = ar_scores.per_token(lines, "logprob") - ar_scores.per_token(bounds, "elbo")
    assert f"{gap:.4f}" in capsys.readouterr().out

    bounds[3]["tokens"] += 1
    with pytest.raises(ConfigError, match=r"response tokens of line 4, and the model scored"):
        ar_scores.check_counts(lines, bounds, elbo)


def test_a_text_has_no_prediction_of_its_first_token(model, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "Once upon a time"}\n')
    (line,) = ar_scores.score_file(model, tmp_path / "texts.jsonl")
    assert line["unscored"] == 1
    network, vocabulary = AutoModelForCausalLM.from_pretrained(model), autoregressive.vocabulary_of(model)
    ids = torch.tensor([[*vocabulary.tokenizer("Once upon a time")["input_ids"], vocabulary.special.eos]])
    assert line["tokens"] == ids.shape[1]
    logprobs = network(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    assert line["logprob"] == pytest.approx(logprobs.sum().item(), abs=1e-3)


def test_answers_are_greedy_whatever_the_batch_and_are_not_decoded_again(model, held_out, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    words = ["answer", "--model", str(model), "--data", str(held_out), "--max-new-tokens", "8", "--output", str(output)]
    assert ar.main([*words, "--batch-size", "4"]) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    network, vocabulary = AutoModelForCausalLM.from_pretrained(model), autoregressive.vocabulary_of(model)
    for line in lines[:4]:
        assert line["output_ids"] == greedy_by_hand(network, vocabulary, line["messages"][:-1], 8)
    shown = capsys.readouterr().out
    assert "exact match" in shown

    kept = output.read_text().splitlines(keepends=True)
    output.unlink()
    output.with_name("answers.jsonl.started").write_text("".join(kept[:7]))
    assert ar.main([*words, "--batch-size", "1"]) == 0
    again = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["output_ids"] for line in again] == [line["output_ids"] for line in lines]
    assert again[:7] == lines[:7]  # with their seconds


def test_an_answer_may_be_what_a_pattern_captures():
    line = {"text": "3 + 4 = 7.\nThe answer is 7.", "answer": "7", "output_ids": [1, 2], "cpu_seconds": 1.0}
    cells = [
        list(ar_answers.table_of([line], pattern).columns[2].cells) for pattern in (None, re.compile(r"is (\d+)\.$"))
    ]
    assert cells == [["0.0%"], ["100.0%"]]


def test_speed_takes_turns_on_the_same_prompts_and_goes_on(model, held_out, tmp_path, capsys):
    output = tmp_path / "speed.jsonl"
    words = ["speed", "--ar", str(model), "--diffusion", "tiny", "--data", str(held_out), "--output", str(output)]
    words += [
        "--dtypes",
        "float32",
        "--block-sizes",
        "1",
        "8",
        "--prompts",
        "3",
        "--new-tokens",
        "16",
        "--longest",
        "8",
    ]
    words += ["--rounds", "1", "decode.threshold=0.0"]
    assert ar.main([*words, "--batches", "1", "--kinds", "fixed"]) == 0
    assert ar.main([*words, "--batches", "1", "2", "--kinds", "fixed", "natural"]) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["batch"], line["kind"]) for line in lines[::3]] == [
        (1, "fixed"),
        (1, "natural"),
        (2, "fixed"),
        (2, "natural"),
    ]
    assert [line["side"] for line in lines[:3]] == ["transformers", "block size 1", "block size 8"]
    assert {line["tokens"] for line in lines if line["kind"] == "fixed"} == {3 * 16}
    assert lines[0]["tokens_per_forward"] == 1
    assert lines[2]["tokens_per_forward"] > 2  # a whole block at once
    assert "| 1.00 |" in output.with_suffix(".md").read_text()


def greedy_by_hand(network, vocabulary, messages, count: int) -> list[int]:
    ids = vocabulary.encoder.encode_prompt(messages)
    start = len(ids)
    while len(ids) < start + count and (len(ids) == start or ids[-1] != vocabulary.special.eos):
        ids = [*ids, network(torch.tensor([ids])).logits[0, -1].argmax().item()]
    return ids[start:]
