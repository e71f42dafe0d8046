"""What each tool writes, counts and refuses."""

import itertools
import json
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from dfactory.cli import main
from dfactory.data.examples import DocumentRules
from dfactory.data_tools.command import VERBS
from dfactory.errors import ConfigError, DataError, RolloutError
from tests.test_assets import DATA

ROOT = Path(__file__).parents[2]


def chat(question, answer, **further):
    turns = [("user", question), ("assistant", answer)]
    return {"messages": [{"role": role, "content": text} for role, text in turns], **further}


def texts(row, column="messages"):
    return [(message["role"], message["content"]) for message in row[column]]


# --- the command line -------------------------------------------------------------------------------------------------


def test_verbs_are_reached_both_ways_and_tell_what_is_wrong(capsys, tmp_path):
    missing = str(tmp_path / "none.jsonl")
    assert main(["data", "validate", missing]) == 1
    first = capsys.readouterr().err
    done = subprocess.run(
        [sys.executable, "-m", "data_tools.validate", missing], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, "none.jsonl is not a file" in done.stderr) == (1, True)
    assert "none.jsonl is not a file" in first
    assert main(["data", "validat"]) == 2
    assert f"use one of {', '.join(VERBS)}" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_a_checkout_has_every_verb_under_its_short_name(verb):
    short, installed = (
        import_module(f"{package}.{verb.replace('-', '_')}") for package in ("data_tools", "dfactory.data_tools")
    )
    assert short.main is installed.main


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["data", verb, "--help"])
    assert f"dfactory data {verb}" in capsys.readouterr().out


def test_help_of_the_command_line_imports_nothing_heavy():
    code = "import sys; from dfactory import cli; cli._parser(); print({'torch', 'numpy', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- convert ----------------------------------------------------------------------------------------------------------


def test_rows_become_the_readers_own_formats(files, tool, rows_of, tmp_path):
    gsm8k = {"question": "1 + 1?", "answer": "One and one.\n#### 2", "level": 1}
    alpaca = {"instruction": "Add", "input": "1 2", "output": "3", "system": "Be brief.", "history": [["a?", "b"]]}
    turns = [
        ("human", "w?"),
        ("function_call", '{"name": "f", "arguments": {"a": 1}}'),
        ("observation", "2"),
        ("gpt", "two"),
    ]
    sharegpt = {"conversations": [{"from": name, "value": text} for name, text in turns], "tools": '[{"name": "f"}]'}
    pair = {"chosen": texts_to_messages("q", "good"), "rejected": texts_to_messages("q", "bad")}
    rows = [gsm8k, alpaca, sharegpt, pair, {"text": "once"}, {"input_ids": [5, 6], "prompt_lengths": 1}]
    status, shown = tool("convert", files("in.jsonl", *rows), "--output", tmp_path / "out.jsonl")
    assert status == 0
    assert "3 conversations, 1 pairs, 1 texts, 1 rows of token ids" in shown
    question, instruction, called, preferred, text, ids = rows_of(tmp_path / "out.jsonl")
    assert texts(question) == [("user", "1 + 1?"), ("assistant", "One and one.\n#### 2")]
    assert (question["answer"], question["level"]) == ("2", 1)
    expected = [("system", "Be brief."), ("user", "a?"), ("assistant", "b"), ("user", "Add\n1 2"), ("assistant", "3")]
    assert texts(instruction) == expected
    assert [message["role"] for message in called["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert called["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert texts(preferred, "prompt") == [("user", "q")]
    assert (texts(preferred, "chosen"), texts(preferred, "rejected")) == (
        [("assistant", "good")],
        [("assistant", "bad")],
    )
    assert (text, ids) == ({"text": "once"}, rows[-1])


def texts_to_messages(question, answer):
    return chat(question, answer)["messages"]


def test_labelled_answers_become_pairs(files, tool, rows_of, tmp_path):
    """Answers to one prompt, however it is written; what finds no other one is counted."""
    rows = [
        {"prompt": "q?", "completion": "yes", "label": True},
        {"prompt": "Q?", "completion": "no", "label": False},
        {"prompt": "q?", "completion": "maybe", "label": False},
        {**chat("w?", "rain"), "kto_tag": False},
        {**chat("w?", "sun"), "kto_tag": True},
        {**chat("w?", "snow"), "kto_tag": 1},
        {"prompt": "x?", "completion": "same", "label": True},
        {"prompt": "x?", "completion": "same", "label": False},
        {"prompt": "x?", "completion": "unlabelled"},
    ]
    path, output = files("kto.jsonl", *rows), tmp_path / "pairs.jsonl"
    words = ["convert", path, "--pair-labels", "--output", output]
    with pytest.raises(DataError, match=r"kto.jsonl:8: chosen equals rejected"):
        tool(*words)
    shown = tool(*words, "--skip-bad")[1]
    assert "kto.jsonl:9: the row has no label" in shown
    assert "1 good and 1 bad answers have no counterpart and are left out" in shown
    text, talk = rows_of(output)
    assert text == {"prompt": "Q?", "chosen": "yes", "rejected": "no"}
    assert (texts(talk, "chosen"), texts(talk, "rejected")) == ([("assistant", "sun")], [("assistant", "rain")])


def test_rows_are_rewritten_as_the_keys_of_a_recipe_would(files, tool, rows_of, tmp_path):
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    row = {"q": "1 + 1?", "reply": f"<think>Well.</think>{call}"}
    words = ["convert", files("rows.jsonl", row), "--output", tmp_path / "out.jsonl", "--rename", "q=question"]
    assert tool(*words, "--rename", "reply=response", "--reasoning", "strip")[0] == 0
    assert texts(rows_of(tmp_path / "out.jsonl")[0]) == [("user", "1 + 1?"), ("assistant", call)]
    talk = files("talk.jsonl", chat("w?", call))
    assert tool("convert", talk, "--output", tmp_path / "out.jsonl", "--tool-calls", "parse")[0] == 0
    assert rows_of(tmp_path / "out.jsonl")[0]["messages"][1]["tool_calls"][0]["function"]["name"] == "f"
    with pytest.raises(ConfigError, match="every column a name of its own"):
        tool(*words, "--rename", "reply=question")


def test_parquet_and_gzip_there_and_back(files, tool, rows_of, tmp_path):
    """Arguments of calls with different keys stay apart, although parquet wants columns of one type."""
    calls = [
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
        for arguments in ({"a": 1}, {"b": "x"})
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    question = {"role": "user", "content": "w?"}
    rows = [{"messages": [question, call], "tools": tools, "n": n} for n, call in enumerate(calls)] + [
        chat("a", "b", n=7)
    ]
    steps = [files("in.jsonl", *rows), *(str(tmp_path / name) for name in ("a.parquet", "b.jsonl.gz", "c.jsonl"))]
    for source, target in itertools.pairwise(steps):
        assert tool("convert", source, "--output", target)[0] == 0
    assert rows_of(steps[-1]) == rows


def test_a_row_that_cannot_be_read_is_named_or_counted(files, tool, rows_of, tmp_path):
    path, out = files("in.jsonl", chat("a", "b"), {"x": 1}, chat("a", " ")), tmp_path / "out.jsonl"
    with pytest.raises(DataError, match=r"in.jsonl:2: no known format .*--skip-bad"):
        tool("convert", path, "--output", out)
    assert not list(tmp_path.glob("out*"))
    status, shown = tool("convert", path, "--output", out, "--skip-bad")
    assert status == 0
    assert "2 refused" in shown
    assert "in.jsonl:3: messages[1].content is empty" in shown
    assert len(rows_of(out)) == 1


# --- validate ---------------------------------------------------------------------------------------------------------


def test_the_report_tells_what_is_wrong_and_the_status_says_whether_it_is_too_much(tmp_path, tool):
    rows = [chat("What?", "yes"), chat("what? ", "Yes"), {"x": 1}, chat("<|mask|> is text", "a " * 90), chat("b", "c")]
    file = tmp_path / "in.jsonl"
    file.write_bytes(b"\n".join(json.dumps(row).encode() for row in rows) + b"\n\xff\n{\n")
    words = [file, "--model", "tiny", "--max-length", 64, "--html", tmp_path / "page.html"]
    status, shown = tool("validate", *words)
    shown = " ".join(shown.split())
    assert status == 1
    for expected in (
        "rows 7", "refused 4", "duplicates 1", f"{file}:2 repeats {file}:1", "messages of user 4",
        f"{file}:3: no known format", f"{file}:4: the document has", f"{file}:6: byte 0", f"{file}:7: not valid JSON",
        "<|mask|> first at", "4 of 7 rows are bad (57.14%)", "longer than max_length 64 1 documents",
    ):  # fmt: skip
        assert expected in shown
    page = (tmp_path / "page.html").read_text()
    assert "&lt;|mask|&gt;" in page
    assert "http" not in page
    assert tool("validate", *words, "--max-bad-fraction", 0.6)[0] == 0


def test_token_counts_are_those_of_the_readers(tool, load_heldout):
    status, shown = tool("validate", DATA / "heldout.jsonl", "--model", "tiny")
    shown = " ".join(shown.split())
    report = load_heldout.report
    assert status == 0
    assert f"tokens {report.tokens:,} " in shown
    assert f"trainable {report.trainable_tokens:,} " in shown


@pytest.fixture
def load_heldout():
    from dfactory.config.data import DatasetKeys
    from dfactory.data.examples import load_examples
    from dfactory.vocabulary import read_vocabulary

    vocabulary = read_vocabulary("tiny", mask_token_id=None, eos_token_id=None)
    rules = DocumentRules(64, "refuse", vocabulary.special.eos, vocabulary.size, vocabulary.special.mask)
    bounds = {"on_bad_row": "error", "max_bad_fraction": 0.0, "block_size": 16}
    return load_examples([DatasetKeys(str(DATA / "heldout.jsonl"))], vocabulary.encoder, **vars(rules), **bounds)


def test_a_template_that_does_not_write_tools_refuses_them(files, tool, tmp_path):
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}<role>{{ m.role }}</role>{{ m.content }}<|role_end|>{% endfor %}")
    path = files("in.jsonl", chat("a", "b", tools=[{"type": "function", "function": {"name": "f"}}]))
    status, shown = tool("validate", path, "--model", "tiny", "--chat-template", template)
    assert status == 1
    assert "the conversation has tools, which the chat template does not write" in shown
    assert tool("validate", path, "--model", "tiny")[0] == 0


def test_pairs_and_single_answers_do_not_mix(files, tool):
    pair = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    status, shown = tool("validate", files("in.jsonl", pair, chat("a", "b")))
    assert status == 1
    assert "in.jsonl:2: the row is a single answer, the first one was a preference pair" in shown


# --- split, dedup, mix ------------------------------------------------------------------------------------------------


def test_a_split_shares_no_prompt_and_loses_no_row(files, tool, rows_of, tmp_path):
    rows = [chat(f"{'Q' if n % 2 else ' q'} {n // 4}", f"answer {n}") for n in range(400)]
    words = [files("in.jsonl", *rows), "train=3", "heldout=1", "--output", tmp_path / "parts"]
    assert tool("split", *words)[0] == 0
    parts = {name: rows_of(tmp_path / "parts" / f"{name}.jsonl") for name in ("train", "heldout")}
    prompts = {name: {row["messages"][0]["content"].strip().lower() for row in part} for name, part in parts.items()}
    assert not prompts["train"] & prompts["heldout"]
    assert sorted(map(json.dumps, parts["train"] + parts["heldout"])) == sorted(map(json.dumps, rows))
    assert 15 <= len(prompts["heldout"]) <= 35  # of 100
    tool("split", *words, "--seed", 1)
    assert rows_of(tmp_path / "parts" / "heldout.jsonl") != parts["heldout"]
    with pytest.raises(ConfigError, match="two parts or more"):
        tool("split", *words[:2], "--output", tmp_path)
    with pytest.raises(ConfigError, match=r"part \.\./\.\./x would lie outside"):
        tool("split", "../../x=1", *words)


def test_duplicates_are_left_out(files, tool, rows_of, tmp_path):
    rows = [chat("a b", "c"), chat("A  B", "C"), chat("a b", "d"), chat("e", "c")]
    path, out = files("in.jsonl", *rows), tmp_path / "out.jsonl"
    status, shown = tool("dedup", path, path, "--output", out)
    assert (status, rows_of(out)) == (0, [rows[0], rows[2], rows[3]])
    assert "3 of 8 rows kept, 5 duplicates by record" in shown
    tool("dedup", path, "--output", out, "--by", "prompt")
    assert rows_of(out) == [rows[0], rows[3]]


def test_a_mixture_has_its_weights(files, tool, rows_of, tmp_path):
    names = [files(f"{name}.jsonl", *({"text": f"{name} {n}"} for n in range(200))) for name in "abc"]
    words = [f"{names[0]}=2", f"{names[1]}=0.25", names[2], "--output", tmp_path / "out.jsonl"]
    assert tool("mix", *words)[0] == 0
    mixed = [row["text"] for row in rows_of(tmp_path / "out.jsonl")]
    counts = {name: [text for text in mixed if text.startswith(name)] for name in "abc"}
    assert (len(counts["a"]), len(set(counts["a"]))) == (400, 200)
    assert 30 <= len(counts["b"]) == len(set(counts["b"])) <= 70
    assert sorted(counts["c"]) == sorted(f"c {n}" for n in range(200))
    assert mixed != sorted(mixed)
    tool("mix", *words)
    assert [row["text"] for row in rows_of(tmp_path / "out.jsonl")] == mixed


# --- preview, preferences, rollouts -----------------------------------------------------------------------------------


def test_a_preview_marks_what_is_trained(files, tool):
    path = files("in.jsonl", chat("hi", "yo"), {"x": 1}, {"prompt": "q", "chosen": "good", "rejected": "bad"})
    status, shown = tool("preview", path, "--model", "tiny", "--block-size", 8)
    assert status == 0
    assert "hi<|role_end|><role>ASSISTANT</role>⟦yo<|role_end|><|endoftext|>⟧" in shown
    assert "in.jsonl:2 refused: no known format" in shown
    assert "in.jsonl:3, rejected" in shown
    assert "⟦bad<|endoftext|>⟧" in shown


SHORTER = (
    "def shorter(prompts, completions, **columns):\n    return [-float(len(c[0]['content'])) for c in completions]\n"
)
SAMPLE = ["--model", "tiny", "--init-weights", "random", "decode.max_new_tokens=16", "decode.block_size=16"]


def test_pairs_of_a_models_own_answers_are_ranked_by_a_reward(tool, files, rows_of, tmp_path):
    (tmp_path / "reward.py").write_text(SHORTER)
    prompts = files("in.jsonl", *(chat(f"Say {n}", "x", subject=n) for n in range(3)))
    words = ["--input", prompts, "--output", tmp_path / "pairs.jsonl", "--reward", f"{tmp_path}/reward.py:shorter"]
    words += ["--num-generations", 4, *SAMPLE, "decode.temperature=1.0"]
    assert tool("preferences", *words)[0] == 0
    for row in rows_of(tmp_path / "pairs.jsonl"):
        lengths = [len(row[side][0]["content"]) for side in ("chosen", "rejected")]
        assert lengths[0] < lengths[1]
        assert (-lengths[0], -lengths[1]) == (row["chosen_reward"], row["rejected_reward"])
        assert texts(row, "prompt") == [("user", f"Say {row['subject']}")]
    assert tool("validate", tmp_path / "pairs.jsonl", "--model", "tiny")[0] == 0
    with pytest.raises(ConfigError, match=r"decode\.temperature 0 gives the same answer"):
        tool("preferences", *words[:-1])
    with pytest.raises(RolloutError, match=r"no prompt of .* has two answers"):
        tool("preferences", *words, "--margin", 1e9)


def test_the_answer_of_a_record_is_scored_after_the_models_own(tool, files, rows_of, tmp_path):
    """`{name: exact_match}` refuses what random weights write, so that each pair's chosen side is the record's own."""
    rows = [chat("Say 1", "one") | {"answer": "one"}, {"prompt": "2 is ", "completion": "two", "answer": "two"}]
    words = ["--output", tmp_path / "pairs.jsonl", "--reward", "exact_match", "--num-generations", 1, *SAMPLE]
    assert tool("preferences", "--input", files("in.jsonl", *rows), "--recorded-answers", *words)[0] == 0
    conversation, completion = rows_of(tmp_path / "pairs.jsonl")
    assert texts(conversation, "chosen") == [("assistant", "one")]
    assert (completion["prompt"], completion["chosen"]) == ("2 is ", "two")
    for row in (conversation, completion):
        assert (row["chosen_reward"], row["rejected_reward"]) == (1, 0)
    with pytest.raises(RolloutError, match=r"two answers .* add --recorded-answers"):
        tool("preferences", "--input", tmp_path / "in.jsonl", *words)
    rows[1] = {"prompt": "2 is "}
    with pytest.raises(DataError, match=r"in\.jsonl:2: "):
        tool("preferences", "--input", files("in.jsonl", *rows), "--recorded-answers", *words)


def test_a_reward_has_options(tool, files, rows_of, tmp_path):
    prompts = files("in.jsonl", {"messages": [{"role": "user", "content": "Say x"}], "answer": ""})
    words = ["--input", prompts, "--output", tmp_path / "traces.jsonl", *SAMPLE, "--reward"]
    assert tool("rollouts", *words, "{name: exact_match, answer_pattern: '()$', weight: 3}")[0] == 0
    assert [row["reward"] for row in rows_of(tmp_path / "traces.jsonl")] == [3]
    with pytest.raises(ConfigError, match="answer_pattern 'x' has no group"):
        tool("rollouts", *words, "{name: exact_match, answer_pattern: x}")
    with pytest.raises(SystemExit):
        tool("rollouts", *words, "{name: exact_match")


@pytest.mark.slow
def test_traces_with_verdicts_are_trained_on(tool, files, rows_of, tmp_path):
    (tmp_path / "reward.py").write_text(SHORTER.replace("-float(", "0.1 * ("))
    prompts, traces = files("in.jsonl", *(chat(f"Say {n}", "x") for n in range(4))), tmp_path / "traces.jsonl"
    words = ["--input", prompts, "--output", traces, "--reward", f"{tmp_path}/reward.py:shorter", "--correct-from", 0.1]
    assert tool("rollouts", *words, *SAMPLE)[0] == 0
    rows = rows_of(traces)
    assert [row["correct"] for row in rows] == [row["reward"] >= 0.1 for row in rows]
    assert sum(row["correct"] for row in rows)
    keys = ["model_name_or_path=tiny", "eval_datasets=[]", f"datasets=[{{path: {traces}}}]", "max_steps=1"]
    keys += ["eval_steps=null", "warmup_steps=0", f"output_dir={tmp_path}/run", "save_steps=null"]
    assert main(["train", str(DATA.parent / "trajectory.yaml"), *keys]) == 0


def test_a_report_on_many_rows_takes_seconds(files, tool):
    """A bound that only work that grows with the square of the rows would break."""
    path = files("in.jsonl", *(chat(f"question {n}", f"answer {n}") for n in range(5000)))
    started = time.perf_counter()
    assert tool("validate", path)[0] == 0
    assert time.perf_counter() - started < 60


def test_convert_reads_an_array_of_rows(tmp_path, capsys):
    """As Alpaca's and ShareGPT's data are published."""
    rows = [{"instruction": "Add.", "input": "1 + 1", "output": "2"}, {"instruction": "Say a.", "output": "a"}]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows, indent=1))
    out = tmp_path / "out.jsonl"
    assert main(["data", "convert", str(tmp_path / "alpaca.json"), "--output", str(out)]) == 0
    answers = [json.loads(line)["messages"][-1]["content"] for line in out.read_text().splitlines()]
    assert answers == ["2", "a"]
    (tmp_path / "bad.json").write_text(json.dumps([*rows, {"instruction": 3}]))
    assert main(["data", "convert", str(tmp_path / "bad.json"), "--output", str(out)]) == 1
    assert "bad.json:3: " in capsys.readouterr().err
    for text in ('{"a": 1}', '{"a": 1}\n{"b": 2}'):
        (tmp_path / "no.json").write_text(text)
        assert main(["data", "convert", str(tmp_path / "no.json"), "--output", str(out)]) == 1
        assert ".jsonl" in capsys.readouterr().err
