"""`eval` on records, on reasoning-gym's tasks, and at several values of a decode key."""

import json
import re
import shutil
from pathlib import Path

import pytest

from dfactory.cli import main
from dfactory.commands.evaluate import task_questions, wilson_interval
from dfactory.errors import ConfigError
from dfactory.models.tiny import TINY_DIR
from tests.commands.conftest import GOLDEN

TINY = ("--model", "tiny", "decode.block_size=8", "decode.max_new_tokens=16")
QUESTIONS = ("Which day follows Monday?", "What is 3 + 4?", "Sort the letters: XRL")


@pytest.fixture
def records(tmp_path) -> Path:
    rows = [{"messages": [{"role": "user", "content": question}], "answer": "no"} for question in QUESTIONS]
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_wilson_interval():
    """Worked by hand: 8 of 10, z 1.96: centre 11.9208 / 13.8416, half width 0.2265."""
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=2e-4)
    assert wilson_interval(0, 10)[0] == 0
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=2e-4)


def test_a_sweep_is_a_table_and_a_line_a_threshold(records, tmp_path, capsys):
    file = tmp_path / "sweep.jsonl"
    words = ["eval", *TINY, "--data", str(records)]
    assert main([*words, "--thresholds", "0.001,1.0", "--output", str(file)]) == 0
    assert "evaluation of 3 records" in capsys.readouterr().out
    hasty, careful = (json.loads(line) for line in file.read_text().splitlines())
    assert (hasty["threshold"], careful["threshold"]) == (0.001, 1.0)
    assert hasty["forwards"] < careful["forwards"]
    assert hasty["tokens_per_forward"] > careful["tokens_per_forward"]
    for line in (hasty, careful):
        assert line["exact_match"] == 0
        assert (line["exact_match_low"], line["exact_match_high"]) == wilson_interval(0, 3)
        assert line["tokens_per_second"] > 0
    assert main([*words, "decode.threshold=1.0", "--output", str(tmp_path / "out.jsonl")]) == 0
    alone = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sum(output["forwards"] for output in alone) == careful["forwards"]


def test_a_sweep_over_a_key_of_another_rule(records, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(TINY_DIR, run / "checkpoint-1")
    (run / "LATEST").write_text("checkpoint-1")
    words = ["eval", "--model", str(run), "--data", str(records), "decode.block_size=8", "decode.max_new_tokens=16"]
    assert main([*words, "decode.rule=entropy_bound", "--sweep", "entropy_bound=0,1000"]) == 0
    assert "entropy_bound" in capsys.readouterr().out
    careful, hasty = (json.loads(line) for line in (run / "sweep_entropy_bound.jsonl").read_text().splitlines())
    assert [line["swept"] for line in (careful, hasty)] == ["entropy_bound"] * 2
    assert (careful["entropy_bound"], hasty["entropy_bound"]) == (0, 1000)
    assert hasty["forwards"] < careful["forwards"]
    assert main([*words, "--sweep", "entropy_bound=0.1,0.2"]) == 2
    assert "entropy_bound in --sweep belongs to decode.rule entropy_bound" in capsys.readouterr().err
    assert main([*words, "decode.rule=entropy_bound", "--thresholds", "0.5"]) == 2
    assert "threshold in --thresholds belongs to decode.rule threshold" in capsys.readouterr().err
    assert main([*words, "--sweep", "steps=1,none"]) == 2
    assert "steps in --sweep: it must be int, is str" in capsys.readouterr().err


def test_a_sweep_of_a_run_lies_in_its_folder(records, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(TINY_DIR, run / "checkpoint-1")
    (run / "LATEST").write_text("checkpoint-1")
    words = ["eval", "--model", str(run), "--data", str(records), "--thresholds", "0.5"]
    assert main([*words, "decode.block_size=8", "decode.max_new_tokens=8"]) == 0
    assert json.loads((run / "thresholds.jsonl").read_text())["threshold"] == 0.5


def test_a_model_without_a_tokenizer(tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt_ids": [3, 4], "answer": "x"}\n')
    ids = ("decode.mask_token_id=158", "decode.eos_token_id=156", "decode.max_new_tokens=4")
    assert main(["eval", "--model", str(GOLDEN), "--data", str(prompts), *ids]) == 2
    assert "there is no text to compare with an answer" in capsys.readouterr().err


def test_a_pattern_says_which_part_of_a_response_is_its_answer(tmp_path, capsys):
    file = tmp_path / "empty.jsonl"  # the end of every response is its answer
    rows = [{"messages": [{"role": "user", "content": question}], "answer": ""} for question in QUESTIONS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["eval", *TINY, "--data", str(file)]
    for pattern, right in (([], False), (["--answer-pattern", "()$"], True)):
        assert main([*words, *pattern]) == 0
        assert (" 100.0% " in capsys.readouterr().out) is right
    assert main([*words, "--answer-pattern", "x"]) == 2
    assert "--answer-pattern 'x' has no group: put the answer in parentheses" in capsys.readouterr().err


def test_reasoning_gym_tasks(tmp_path, capsys):
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: pip install 'dfactory[rl]'")
    out = tmp_path / "out.jsonl"
    words = ["eval", *TINY, "--task", "chain_sum", "--task", "letter_counting", "--count", "3", "--output", str(out)]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "chain_sum" in told
    assert "letter_counting" in told
    outputs = [json.loads(line) for line in out.read_text().splitlines()]
    assert [output["task"] for output in outputs] == ["chain_sum"] * 3 + ["letter_counting"] * 3

    rows, score = task_questions(["chain_sum"], 3, seed=0)
    assert rows == task_questions(["chain_sum"], 3, seed=0)[0]
    assert rows != task_questions(["chain_sum"], 3, seed=1)[0]
    right = rows[0].fields | {"text": f" {rows[0].fields['answer']}\n"}
    assert score(right) == 1.0
    assert score(right | {"text": "no idea"}) < 1
    _, score = task_questions(["chain_sum"], 3, 0, re.compile(r"is (.+)\."))
    assert score(right | {"text": f"1 + 1 = 2\nThe answer is {rows[0].fields['answer']}."}) == 1.0
    with pytest.raises(ConfigError, match=r"--task chain_smu: .* did you mean chain_sum\?"):
        task_questions(["chain_smu"], 3, seed=0)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--task", "chain_sum", "--repair"], "--repair and --elbo-pairs read records"),
        (["--task", "chain_sum", "--elbo-pairs", "2"], "--repair and --elbo-pairs read records"),
        (["--lm-eval", "x", "--thresholds", "0.5"], "--thresholds with --lm-eval"),
        (["--lm-eval", "x", "--sweep", "threshold=0.5"], "--sweep or --thresholds with --lm-eval"),
    ],
)
def test_options_that_do_not_go_together(capsys, words, message):
    assert main(["eval", *TINY, *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--data", "x", "--task", "y"],
        ["--data", "x", "--thresholds", "0.5,2"],
        ["--data", "x", "--sweep", "steps="],
    ],
)
def test_usage_errors(words):
    with pytest.raises(SystemExit) as ended:
        main(["eval", *TINY, *words])
    assert ended.value.code == 2
