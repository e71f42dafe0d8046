"""`dfactory data distil`: whose answers it writes, which, in what form, and how interrupted work goes on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dfactory.data.chat import ChatEncoder
from dfactory.data.fields import Completion
from dfactory.data.records import read_records
from dfactory.data_tools import meter
from dfactory.data_tools.interrupts import EXIT_TERMINATED
from dfactory.data_tools.journal import Journal
from dfactory.data_tools.verdicts import most_repeats
from dfactory.errors import CheckpointError, ConfigError, DataError, RolloutError

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for m in messages %}<start>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)
ENDS = list(range(1, 256, 8))  # an answer ends at <end> or at one of these bytes: after 8 tokens on average


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """Llama with random weights over bytes; grouped heads, and scores that differ from token to token."""
    folder = tmp_path_factory.mktemp("teacher")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", bos_token="<start>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.4,
        )
    )
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, *ENDS], do_sample=True, temperature=3.0, repetition_penalty=1.5
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def endless(teacher, tmp_path_factory) -> Path:
    """The same model, which ends an answer with <end> alone: it hardly ever does."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    shutil.copytree(teacher, folder)
    (folder / "generation_config.json").unlink()
    return folder


@pytest.fixture(scope="module")
def looping(endless, tmp_path_factory) -> Path:
    """Weights of zero, whose most probable token is always the first."""
    folder = tmp_path_factory.mktemp("looping") / "model"
    shutil.copytree(endless, folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(folder)
    return folder


def asked(text, **further):
    return {"messages": [{"role": "user", "content": text}], **further}


PROMPTS = [asked(f"What is {'so ' * (n % 5)}{n}?", answer=str(n), task=f"task {n % 2}") for n in range(21)]


@pytest.fixture
def distil(teacher, tool, files, rows_of, tmp_path):
    """distil(rows, word, ...) -> the lines that it writes, and what it prints. A word overrides the same one before it."""

    def call(rows, *words, name="out"):
        path = files(f"{name}_in.jsonl", *rows)
        defaults = ["--model", teacher, "--prompts", path, "--output", tmp_path / f"{name}.jsonl"]
        defaults += ["--max-new-tokens", 20, "--batch-size", 4, "--device", "cpu", "--dtype", "float32"]
        status, shown = tool("distil", *defaults, *words)
        assert status == 0, shown
        return rows_of(tmp_path / f"{name}.jsonl"), shown

    return call


def answers(rows):
    return [row["messages"][-1]["content"] for row in rows]


# --- answers ----------------------------------------------------------------------------------------------------------


def test_answers_are_those_that_generate_gives_one_prompt_at_a_time(teacher, distil):
    model = LlamaForCausalLM.from_pretrained(teacher).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(teacher)
    ends = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=ends[0])
    expected = []
    for row in PROMPTS:
        ids = ChatEncoder(tokenizer).encode_prompt(row["messages"])
        (whole,) = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=20).tolist()
        answer = whole[len(ids) :]
        expected.append(tokenizer.decode(answer[:-1] if answer[-1] in ends else answer, skip_special_tokens=True))
    rows, shown = distil(PROMPTS, "--keep", "all")
    assert len(set(expected)) > 10
    lengths = {len(text) for text in expected}
    assert min(lengths) < 16 < max(lengths)  # some leave the batch before the others
    kept = [(row, text) for row, text in zip(PROMPTS, expected, strict=True) if text.strip()]
    assert answers(rows) == [text for _, text in kept]
    assert [row["answer"] for row in rows] == [row["answer"] for row, _ in kept]
    assert f"{len(kept)} answers to 21 prompts" in shown


def test_drawn_answers_depend_on_seed_and_prompt_and_not_on_the_batch(distil):
    words = ["--temperature", 1, "--top-p", 0.9, "--keep", "all", "--num-samples", 3]
    rows, _ = distil(PROMPTS[:7], *words, name="a")
    assert answers(rows) == answers(distil(PROMPTS[:7], *words, "--batch-size", 16, name="b")[0])
    assert answers(rows) == answers(distil(PROMPTS[:7], *words, "--batch-size", 1, name="c")[0])
    assert answers(rows) != answers(distil(PROMPTS[:7], *words, "--seed", 1, name="d")[0])
    first = [answer for row, answer in zip(rows, answers(rows), strict=True) if row["answer"] == "0"]
    assert len(set(first)) == len(first) > 1
    cold = distil(PROMPTS[:7], "--temperature", 1e-4, "--keep", "all", name="e")[0]
    assert cold == distil(PROMPTS[:7], "--keep", "all", name="f")[0]


# --- records ----------------------------------------------------------------------------------------------------------


def test_every_format_of_a_prompt_becomes_a_record_whose_last_answer_is_trained(distil, endless, tmp_path):
    turns = [("user", "a"), ("assistant", "old"), ("user", "b"), ("assistant", "left out")]
    messages = [{"role": role, "content": text} for role, text in turns]
    rows = [
        {"messages": messages, "system": "Be brief.", "n": 1},
        {"prompt": messages[:3], "completion": messages[3:], "n": 2},
        {"prompt": "Once upon", "completion": " a time", "n": 3},
        {"instruction": "Add", "input": "1 2", "output": "3", "n": 4},
        {"question": "1 + 1?", "answer": "2", "n": 5},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}], "label": False, "n": 6},
    ]
    written, _ = distil(rows, "--model", endless, "--keep", "all", "--system", "Be kind.")
    assert [row["n"] for row in written] == [1, 2, 3, 4, 5, 6]
    shown = [[(turn["role"], turn["content"]) for turn in row.get("messages", ())[:-1]] for row in written]
    history = [("user", "a"), ("assistant", "old"), ("user", "b")]
    assert shown == [
        [("system", "Be brief."), *history],
        [("system", "Be kind."), *history],
        [],
        [("system", "Be kind."), ("user", "Add\n1 2")],
        [("system", "Be kind."), ("user", "1 + 1?")],
        [("system", "Be kind."), ("user", "hi")],
    ]
    assert set(written[2]) == {"prompt", "completion", "n"}
    assert written[4]["answer"] == "2"
    records = [record for _, record in read_records(tmp_path / "out.jsonl")]
    for row, record in zip(written, records, strict=True):
        if "messages" in row:
            trained = [m["content"] for m in record.messages if m["role"] == "assistant" and m.get("weight") != 0]
            assert trained == [row["messages"][-1]["content"]]
    assert records[2] == Completion("Once upon", written[2]["completion"])


def test_files_follow_each_other_up_to_a_limit(endless, tool, files, rows_of, tmp_path):
    paths = [files(f"{name}.jsonl", *(row | {"of": name} for row in PROMPTS[:4])) for name in "ab"]
    words = ["--model", endless, "--max-new-tokens", 4, "--keep", "all", "--limit", 6]
    assert tool("distil", "--prompts", *paths, *words, "--output", tmp_path / "out.jsonl")[0] == 0
    assert [row["of"] for row in rows_of(tmp_path / "out.jsonl")] == ["a"] * 4 + ["b"] * 2


# --- what is left out -------------------------------------------------------------------------------------------------


def test_what_is_left_out_is_counted(distil, looping):
    everything, _ = distil(PROMPTS, "--keep", "all", name="all")
    finished, shown = distil(PROMPTS, name="finished")
    cut = len(everything) - len(finished)
    assert f"left out: {cut} cut at --max-new-tokens" in shown
    assert 0 < len(finished) < len(everything)
    assert [row for row in everything if row in finished] == finished

    words = ["--model", looping, "--keep", "all", "--drop-repeats", 3]
    with pytest.raises(RolloutError, match=r"no answer is left to write: .* 21 repetitive"):
        distil(PROMPTS, *words, name="loops")
    assert len(distil(PROMPTS, *words[:-1], 20, name="patient")[0]) == 21


def test_most_repeats_counts_the_most_frequent_run():
    assert most_repeats([1, 2] * 4, length=2) == 4
    assert most_repeats(list(range(20))) == 1
    assert most_repeats([7] * 20) == 13
    assert most_repeats([1, 2, 3]) == 0


def test_only_right_answers_are_written(distil, tmp_path):
    said = {
        row["task"] + row["answer"]: text for row, text in _answered(distil(PROMPTS, "--keep", "all", name="all")[0])
    }
    rows = []
    for n, row in enumerate(PROMPTS):
        text = said.get(row["task"] + row["answer"], "?")
        rows.append(row | {"answer": text if n % 2 else f"not {text}", "n": n})
    right, shown = distil(rows, "--keep", "all", "--reward", "exact_match", name="reward")
    assert right
    assert all(row["n"] % 2 and row["answer"].strip() == row["messages"][-1]["content"].strip() for row in right)
    assert f"{len(said) - len(right)} wrong" in shown
    assert distil(rows, "--keep", "all", "--answer-pattern", r"(?s)^(.*)$", name="pattern")[0] == right
    rows[0].pop("answer")
    assert "1 unscored" in distil(rows, "--keep", "all", "--answer-pattern", r"(?s)^(.*)$", name="unscored")[1]


def _answered(rows):
    return zip(rows, answers(rows), strict=True)


def test_prompts_that_are_too_long_are_counted(distil, endless):
    words = ["--model", endless, "--keep", "all"]
    rows, shown = distil([*PROMPTS[:5], asked("long " * 60), PROMPTS[5]], *words)
    assert "1 prompts too long" in shown  # 256 positions
    assert [row["answer"] for row in rows] == [str(n) for n in range(6)]
    with pytest.raises(RolloutError, match=r"no answer is left to write: .* 5 prompts too long"):
        distil(PROMPTS[:5], *words, "--max-prompt-tokens", 3, name="none")


# --- interrupted ------------------------------------------------------------------------------------------------------


@pytest.fixture
def sigint():
    """SIGINT interrupts, here and in processes started from here, also where a shell started the tests in the background:
    it ignores SIGINT for them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


REWARD = """
import os, pathlib
calls = 0

def interrupt(prompts, completions, **columns):
    global calls
    calls += 1
    once = pathlib.Path(__file__).with_suffix(".done")
    if calls == {call} and not once.exists():
        once.touch()
        os.kill(os.getppid(), {number})
    return [1.0] * len(completions)
"""


@pytest.mark.usefixtures("sigint")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, EXIT_TERMINATED), (signal.SIGINT, 130)])
def test_interrupted_work_goes_on_and_ends_with_the_same_bytes(number, status, teacher, tool, files, tmp_path):
    """A reward interrupts the process that waits for it, in the middle of a window."""
    words = ["--model", teacher, "--prompts", files("in.jsonl", *PROMPTS), "--max-new-tokens", 20, "--keep", "all"]
    words += ["--dtype", "bfloat16", "--batch-size", 2, "--temperature", 1, "--num-samples", 2]
    for name, call in (("whole", 0), ("cut", 15)):
        (tmp_path / f"{name}.py").write_text(REWARD.format(call=call, number=int(number)))
    rewards = {name: f"{tmp_path}/{name}.py:interrupt" for name in ("whole", "cut")}
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert tool("distil", *words, "--output", whole, "--reward", rewards["whole"])[0] == 0
    words += ["--output", cut, "--reward", rewards["cut"]]
    stopped, shown = tool("distil", *words)
    assert stopped == status
    assert "the same command goes on" in shown
    partial = tmp_path / "cut.jsonl.partial"
    done = partial.read_bytes()
    assert done
    assert whole.read_bytes().startswith(done)
    assert not cut.exists()
    partial.write_bytes(done + b'{"half a row')
    assert tool("distil", *words)[0] == 0
    assert cut.read_bytes() == whole.read_bytes()
    assert not partial.exists()
    status, shown = tool("distil", *words)
    assert (status, "finished before" in shown) == (0, True)


@pytest.mark.slow
@pytest.mark.usefixtures("sigint")
def test_a_real_process_is_interrupted(endless, tool, files, tmp_path):
    rows = [asked(f"{'why ' * (n % 7)}{n}?") for n in range(40)]
    words = ["--model", endless, "--prompts", files("in.jsonl", *rows), "--max-new-tokens", 60]
    words += ["--keep", "all"]
    words = [str(word) for word in [*words, "--batch-size", 2, "--output", tmp_path / "cut.jsonl"]]
    record = tmp_path / "cut.jsonl.distil.json"
    command = [sys.executable, "-m", "dfactory.cli", "data", "distil", *words]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ)
    while process.poll() is None and not (record.is_file() and json.loads(record.read_text())["state"]):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert "the same command goes on" in process.communicate()[1]
    assert process.returncode == 130
    assert tool("distil", *words)[0] == 0
    assert tool("distil", *words, "--output", tmp_path / "whole.jsonl")[0] == 0
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_an_output_has_one_writer_and_its_name_when_it_is_whole(tmp_path):
    output = tmp_path / "new" / "rows.jsonl"
    with Journal.of(output, "verb", {"a": 1}) as journal:
        with pytest.raises(ConfigError, match="another process writes"), Journal.of(output, "verb", {"a": 1}):
            pass
        journal.write({"n": 1})
        journal.save()
        journal.write({"n": 2})
    assert journal.partial.read_text() == '{"n": 1}\n'
    before = journal.record.read_bytes()
    with Journal.of(output, "verb", {"a": 1}) as journal:
        journal.finish()
    assert Journal.of(output, "verb", {"a": 1}).is_finished
    journal.record.write_bytes(before)  # the process ended after the rename
    assert Journal.of(output, "verb", {"a": 1}).is_finished
    output.unlink()
    with pytest.raises(DataError, match=r"rows.jsonl.partial lacks rows that .*rows.jsonl.verb.json counts"):
        Journal.of(output, "verb", {"a": 1})


def test_progress_without_a_terminal_is_a_line_now_and_then(distil, monkeypatch):
    line = re.compile(r"\d+ of 21 prompts, \d+ written, [\d,]+ tokens/s, about 0 min left")
    assert not line.search(distil(PROMPTS, name="a")[1])
    monkeypatch.setattr(meter, "LINE_S", 0.0)
    shown = distil(PROMPTS, "--batch-size", 4, name="b")[1]
    assert line.search(shown)
    assert [int(done) for done in re.findall(r"(\d+) of 21 prompts", shown)] == [4, 8, 12, 16, 20, 21], (
        "also those that wait"
    )


def test_other_settings_are_refused_by_key(distil, tmp_path):
    distil(PROMPTS[:3], "--keep", "all")
    for words, named in (
        (["--temperature", 0.5], "temperature 0.0, and is now asked for with 0.5"),
        (["--max-new-tokens", 21], "max_new_tokens 20"),
        (["--system", "Be kind."], "system null"),
    ):
        with pytest.raises(ConfigError, match=f"was started with {named}"):
            distil(PROMPTS[:3], "--keep", "all", *words)
    with pytest.raises(ConfigError, match="was started with prompts_sha256"):
        distil(PROMPTS[:2], "--keep", "all")
    (tmp_path / "out.jsonl.distil.json").write_text("{")
    with pytest.raises(DataError, match=r"out.jsonl.distil.json is damaged"):
        distil(PROMPTS[:3], "--keep", "all")
    (tmp_path / "out.jsonl.distil.json").unlink()
    with pytest.raises(ConfigError, match=r"out.jsonl exists, without out.jsonl.distil.json"):
        distil(PROMPTS[:3], "--keep", "all")


# --- errors -----------------------------------------------------------------------------------------------------------


def test_errors_name_what_is_wrong(distil, tmp_path):
    for words, message in (
        (["--output", tmp_path / "out.parquet"], r"must end in .jsonl"),
        (["--num-samples", 2], "--temperature 0 gives the same answer every time"),
        (["--answer-pattern", "("], "is no regular expression"),
        (["--reward", "exakt_match"], "did you mean exact_match"),
        (["--model", "tiny"], "is a diffusion model"),
    ):
        with pytest.raises(ConfigError, match=message):
            distil(PROMPTS[:2], *words)
    with pytest.raises(DataError, match=r"out_in.jsonl:2: no known format of a prompt"):
        distil([PROMPTS[0], {"x": 1}])
    with pytest.raises(DataError, match=r"out_in.jsonl:1: prompt_ids"):
        distil([{"prompt_ids": [1, 2]}])
    (tmp_path / "empty").mkdir()
    with pytest.raises((ConfigError, CheckpointError), match="tokenizer"):
        distil(PROMPTS[:2], "--model", tmp_path / "empty")
