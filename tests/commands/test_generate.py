"""Traces that `generate --keep-trace` writes: complete, and true to what `eval` says of the same responses."""

import json
from pathlib import Path

import pytest

from dfactory.assembly import read_inputs
from dfactory.cli import main
from dfactory.noise import state_before
from dfactory.recipe import load_recipe
from dfactory.types import Edit, FinishReason, Rollout
from tests.commands.conftest import GOLDEN, ROOT, dfactory, write_recipe

TRACE = {"token_ids", "commit_step", "commit_logprob", "first_commit_step", "edits", "block_size", "block_forwards"}
TRACE |= {"block_origin", "masks_left"}
DATA = ROOT / "recipes/quickstart/data"
QUESTIONS = ("Which day follows Monday?", "What is 3 + 4?", "Sort the letters: XRL")
TINY = ("--model", "tiny", "--init-weights", "random", "decode.max_new_tokens=16", "decode.block_size=8")


def generate(folder: Path, rows: list[dict], *words: str) -> list[dict]:
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words += ("--input", str(folder / "prompts.jsonl"), "--output", str(folder / "out.jsonl"))
    assert main(["generate", *words]) == 0
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def rollout_of(row: dict) -> Rollout:
    fields = {name: row[name] for name in (*TRACE, "prompt_ids", "output_ids", "forwards", "finish_reason")}
    fields |= {"edits": [Edit(**edit) for edit in row["edits"]], "finish_reason": FinishReason(row["finish_reason"])}
    return Rollout(**fields)


def test_the_mask_that_a_recipe_stated_goes_with_its_weights(golden_run, tmp_path):
    """No tokenizer tells it: neither decoding nor further training has to be told again."""
    row = {"prompt_ids": [3, 4, 5]}
    words = ("--model", str(golden_run), "decode.max_new_tokens=5")
    (output,) = generate(tmp_path, [row], *words, "decode.eos_token_id=156")
    assert len(output["output_ids"]) == 5
    assert output == generate(tmp_path, [row], *words, "decode.eos_token_id=156", "decode.mask_token_id=158")[0]

    file = write_recipe(tmp_path, golden_run, 150, mask=None, eos=156)
    assert read_inputs(load_recipe(file)).special.mask == 158
    assert read_inputs(load_recipe(file, ["mask_token_id=157"])).special.mask == 157


@pytest.mark.parametrize("editing", ["null", "0.0"])
def test_a_line_holds_the_whole_trace(tmp_path, editing):
    rows = [{"messages": [{"role": "user", "content": question}], "answer": "no"} for question in QUESTIONS]
    words = (*TINY, f"decode.editing_threshold={editing}", "decode.threshold=0.001", "decode.max_post_steps=2")
    plain = generate(tmp_path, rows, *words)
    traced = generate(tmp_path, rows, *words, "--keep-trace")
    for before, after in zip(plain, traced, strict=True):
        assert after.keys() - before.keys() == TRACE | {"prompt_ids", "correct"}
        assert before == {name: after[name] for name in before}
        assert after["correct"] is False
        assert after["block_size"] == 8
        assert (len(after["prompt_ids"]) + len(after["token_ids"])) % 8 == 0
        assert after["token_ids"][: len(after["output_ids"])] == after["output_ids"]
        rollout = rollout_of(after)
        assert sum(rollout.block_forwards) == rollout.forwards
        assert bool(rollout.edits) == (editing != "null")
        first = state_before(rollout, 0, mask_id=-7)
        assert (first == -7).all()
        assert len(first) == 8 - len(after["prompt_ids"]) % 8


def test_correct_is_what_eval_counts(tmp_path, capsys):
    rows = [{"messages": [{"role": "user", "content": question}]} for question in QUESTIONS]
    texts = [output["text"] for output in generate(tmp_path, rows, *TINY)]
    answers = [f" {texts[0]}\n", f"{texts[1]}?", texts[2]]
    rows = [row | {"answer": answer} for row, answer in zip(rows, answers, strict=True)]
    outputs = generate(tmp_path, rows, *TINY, "--keep-trace")
    assert [output["correct"] for output in outputs] == [True, False, True]
    capsys.readouterr()
    assert main(["eval", *TINY, "--data", str(tmp_path / "prompts.jsonl")]) == 0
    assert "66.7%" in capsys.readouterr().out


def test_no_verdict_without_text_or_answer(tmp_path):
    ids = ("decode.mask_token_id=158", "decode.eos_token_id=156", "decode.block_size=8", "decode.max_new_tokens=10")
    words = ("--model", str(GOLDEN), *ids, "--keep-trace")
    rows = [{"prompt_ids": [1, 2, 3], "answer": "x"}, {"prompt_ids": [4] * 9, "answer": 7}]
    for row, output in zip(rows, generate(tmp_path, rows, *words), strict=True):
        assert "correct" not in output
        assert output["prompt_ids"] == row["prompt_ids"]
        assert output.keys() >= TRACE


# --- from answers to training on their trajectories --------------------------------------------------------------------


@pytest.mark.slow
def test_traces_are_trained_on(tmp_path, capsys):
    """The quickstart's recipe on traces of a random model: what `check` says of them, and three steps."""
    rows = [json.loads(line) for line in (DATA / "train.jsonl").read_text().splitlines()[:12]]
    outputs = generate(tmp_path, rows, *TINY, "decode.threshold=0.001", "--keep-trace")
    traces, run = tmp_path / "traces.jsonl", tmp_path / "run"
    traces.write_text("".join(json.dumps(output | {"correct": i != 5}) + "\n" for i, output in enumerate(outputs)))
    recipe = [str(ROOT / "recipes/quickstart/trajectory.yaml"), "model_name_or_path=tiny", "init_weights=random"]
    recipe += ["eval_datasets=[]", f"output_dir={run}", "row_length=null", "block_size=8", "max_steps=3"]

    def check(file: Path, status: int) -> str:
        capsys.readouterr()
        assert main(["check", *recipe, f"datasets=[{{path: {file}}}]"]) == status
        return " ".join(capsys.readouterr().out.split())

    told = check(traces, 0)
    assert "11 documents of" in told
    assert "left out 1 traces whose response" in told
    assert "view 1 of 2" in told
    (tmp_path / "mixed.jsonl").write_text(traces.read_text() + '{"input_ids": [5, 6, 7], "prompt_lengths": 1}\n')
    assert "mixed.jsonl:13: the record has no commit_step" in check(tmp_path / "mixed.jsonl", 1)

    dfactory("train", *recipe, f"datasets=[{{path: {traces}}}]")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["targets"] > 0 for row in rows)
