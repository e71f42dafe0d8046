"""lm-eval on a checkpoint: the registered model, and OpenAI's completions of a server. No hub is asked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dfactory.cli import main
from dfactory.vocabulary import read_vocabulary
from tests.commands.conftest import ROOT
from tests.serving.conftest import serving

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'dfactory[eval]'")
HELD_OUT = ROOT / "recipes/quickstart/data/heldout.jsonl"
COUNT = 6


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> Path:
    """`quick`, which generates, and `which`, which chooses between an answer and its reverse."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [json.loads(line) for line in HELD_OUT.read_text().splitlines()[:COUNT]]
    choices = [{"question": row["messages"][0]["content"], "choices": [row["answer"], "?!"]} for row in rows]
    (folder / "which.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choices))
    (folder / "quick.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(name: str, **keys) -> None:
        files = {"data_files": {"test": str(folder / f"{name}.jsonl")}, "cache_dir": str(tmp_path / "cache")}
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | keys))

    write(
        "quick",
        output_type="generate_until",
        doc_to_text="{{messages[0].content}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 24, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    write(
        "which",
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target=0,
        target_delimiter="",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
    return folder


def test_generating_and_choosing_tasks(tasks, tmp_path, capsys):
    out = tmp_path / "results.json"
    words = ["eval", "--model", "tiny", "--include-path", str(tasks), "--chat-template", "--output", str(out)]
    assert main([*words, "--lm-eval", "quick", "--lm-eval", "which", "decode.block_size=16"]) == 0
    told = capsys.readouterr().out
    results = json.loads(out.read_text())
    assert results["n-samples"]["quick"]["effective"] == COUNT
    assert "tokens a forward" in told

    # the responses are those of `dfactory generate`, cut at the end of the line
    answers = tmp_path / "answers.jsonl"
    words = ["--model", "tiny", "--input", str(tasks / "quick.jsonl"), "--output", str(answers)]
    assert main(["generate", *words, "decode.block_size=16", "decode.max_new_tokens=24"]) == 0
    expected = [json.loads(line)["text"].split("\n")[0] for line in answers.read_text().splitlines()]
    given = {sample["doc_id"]: sample["resps"][0][0] for sample in results["samples"]["quick"]}
    assert [given[index] for index in range(COUNT)] == expected


def test_likelihoods_are_elbos(tasks, tmp_path):
    """Of the same tokens, as `eval --elbo-pairs` scores them, with the end of a turn; choices share their noise: a file for
    each choice has them in the same lines. The better bound is chosen."""
    out, limit = tmp_path / "results.json", 3
    words = ["eval", "--model", "tiny", "decode.block_size=16"]
    lm_eval = ["--include-path", str(tasks), "--lm-eval", "which", "--limit", str(limit), "--output", str(out)]
    assert main([*words, *lm_eval, "--chat-template"]) == 0
    results = json.loads(out.read_text())
    vocabulary = read_vocabulary("tiny", mask_token_id=None, eos_token_id=None)
    encoder, eos = vocabulary.encoder, vocabulary.special.eos
    rows = [json.loads(line) for line in (tasks / "which.jsonl").read_text().splitlines()[:limit]]
    expected = []
    for choice in range(2):
        records = tmp_path / f"records{choice}.jsonl"
        with records.open("w") as file:
            for row in rows:
                question = {"role": "user", "content": row["question"]}
                answer = {"role": "assistant", "content": row["choices"][choice]}
                ids = [*encoder.encode_messages([question, answer])[0].tolist(), eos]
                prompt_lengths = len(encoder.encode_prompt([question]))
                file.write(json.dumps({"input_ids": ids, "prompt_lengths": prompt_lengths}) + "\n")
        elbos = tmp_path / f"elbos{choice}.jsonl"
        assert main([*words, "--data", str(records), "--elbo-pairs", "8", "--output", str(elbos)]) == 0
        expected.append([json.loads(line)["elbo"] for line in elbos.read_text().splitlines()])
    given = [[float(choice[0][0]) for choice in sample["resps"]] for sample in results["samples"]["which"]]
    assert given == [pytest.approx(both, rel=1e-5) for both in zip(*expected, strict=True)]
    right = sum(one > other for one, other in zip(*expected, strict=True))
    assert results["results"]["which"]["acc,none"] == pytest.approx(right / limit)


def test_a_whole_answer_beats_one_that_is_cut_where_a_block_ends():
    """The base model knows where its answers end. Equal choices of one question are equally likely, up to rounding."""
    from lm_eval.api.instance import Instance

    from dfactory.commands.harness import BlockDiffusionLM

    model = BlockDiffusionLM("tiny", dtype="float32", pairs=2)
    encoder, size = model.pipeline.vocabulary.encoder, model.pipeline.rules.block_size
    requests = []

    def ask(question: int, context: str, answer: str) -> None:
        requests.append(Instance("loglikelihood", {}, (context, answer), len(requests), ("which", question, 1)))

    for number, row in enumerate(map(json.loads, HELD_OUT.read_text().splitlines())):
        context, answer = row["messages"][0]["content"] + "\n", encoder.encode_text(row["answer"])
        room = -len(encoder.encode_text(context)) % size
        cut = encoder.tokenizer.decode(answer[:room])
        if 0 < room < len(answer) and encoder.encode_text(cut) == answer[:room]:
            ask(number, context, row["answer"])
            ask(number, context, cut)
            ask(number, context, row["answer"])
        if len(requests) == 3 * 40:
            break
    elbos = [elbo for elbo, _ in model.loglikelihood(requests)]
    assert sum(whole <= cut for whole, cut in zip(elbos[::3], elbos[1::3], strict=True)) == 0
    assert elbos[::3] == pytest.approx(elbos[2::3], abs=1e-5)


def test_tasks_that_are_not_there(tmp_path, capsys):
    words = ["eval", "--model", "tiny", "--lm-eval", "quick", "--include-path"]
    assert main([*words, str(tmp_path / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err


@pytest.mark.slow
def test_lm_evals_own_command_line(tasks, tmp_path):
    """The model `dfactory`, by name."""
    words = ["run", "--model", "dfactory", "--tasks", "quick", "--include_path", str(tasks), "--limit", "2"]
    words += ["--model_args", "path=tiny,block_size=16,threshold=0.9", "--output_path", str(tmp_path / "out")]
    command = [sys.executable, "-m", "dfactory.commands.harness", *words]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|quick" in done.stdout
    (file,) = (tmp_path / "out").rglob("*.json")
    assert json.loads(file.read_text())["n-samples"]["quick"]["effective"] == 2


@pytest.mark.slow
def test_local_completions_against_a_server(tasks, tmp_path):
    """lm-eval's own client, over HTTP; it tells texts to stop at, a seed, and how many tokens."""
    pytest.importorskip("tenacity", reason="lm-eval's API clients are not installed: pip install 'dfactory[eval]'")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    with serving(tmp_path) as server:
        results = simple_evaluate(
            model="local-completions",
            model_args=f"base_url={server.url}/v1/completions,model=small,tokenizer_backend=None,num_concurrent=1,"
            "max_retries=1",
            tasks=["quick"],
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            bootstrap_iters=0,
        )
        assert results["n-samples"]["quick"]["effective"] == COUNT
        for sample in results["samples"]["quick"]:
            (text,) = sample["resps"][0]
            prompt = sample["arguments"]["gen_args_0"]["arg_0"] if "gen_args_0" in sample["arguments"] else None
            prompt = prompt or sample["arguments"][0][0]
            body = {"prompt": prompt, "max_new_tokens": 24, "stop": "\n"}
            assert server.ask("/generate", body).body["text"] == text
        refused = server.ask("/v1/completions", {"prompt": "x", "logprobs": 1, "echo": True, "max_tokens": 1})
        assert refused.status == 400
        assert "no left-to-right probability" in refused.message
