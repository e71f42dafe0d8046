"""Prompts are read by the reader of records: the same formats, files and rules of bad rows, for RL, generate and eval."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dfactory.cli import main
from dfactory.data.chat import ChatEncoder
from dfactory.data.prompts import Row, encode_prompt, prompt_of, read_rows
from dfactory.errors import DataError
from dfactory.recipe import load_recipe
from dfactory.rl.prompts import PromptStream
from tests.commands.conftest import ROOT


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = [user("q")]
FORMS = {
    "messages": ({"messages": [*ASKED, bot("a")], "answer": "a"}, ASKED),
    "messages without an answer": ({"messages": ASKED, "answer": "a"}, ASKED),
    "earlier turns": ({"messages": [*ASKED, bot("a"), *ASKED, bot("b")]}, [*ASKED, bot("a"), *ASKED]),
    "TRL's conversational prompt": ({"prompt": ASKED, "answer": "a"}, ASKED),
    "its completion": ({"prompt": ASKED, "completion": [bot("a")]}, ASKED),
    "its preferences": ({"prompt": ASKED, "chosen": [bot("a")], "rejected": [bot("b")]}, ASKED),
    "system": ({"prompt": ASKED, "system": "Be brief.", "answer": "a"}, [SYSTEM, *ASKED]),
    "text": ({"prompt": "q", "answer": 4}, "q"),
    "text and completion": ({"prompt": "q", "completion": "a"}, "q"),
    "instruction": ({"instruction": "a", "input": "b", "answer": "a"}, [user("a\nb")]),
    "alpaca": ({"instruction": "q", "output": "a"}, ASKED),
    "question": ({"question": "q", "answer": "a"}, ASKED),
    "sharegpt": ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ASKED),
    "sharegpt without an answer": ({"conversations": [{"from": "human", "value": "q"}]}, ASKED),
}


@pytest.mark.parametrize("row, prompt", FORMS.values(), ids=FORMS)
def test_the_prompt_of_a_row(row, prompt, tokenizer):
    encoder, row = ChatEncoder(tokenizer), Row("rows.jsonl:1", row)
    assert prompt_of(row) == prompt
    expected = encoder.encode_text(prompt) if isinstance(prompt, str) else encoder.encode_prompt(prompt)
    assert encode_prompt(row, encoder) == expected


@pytest.mark.parametrize(
    "row, said",
    [
        ({"answer": "a"}, "no known format of a prompt has the columns"),
        ({"prompt": "q", "context": "In 2000."}, "`context`"),
        ({"prompt": "q", "system": "Be brief."}, "`system`"),
        ({"prompt": ASKED, "images": ["a.png"]}, "`images`"),
        ({"prompt": 3}, "prompt is int 3"),
        ({"messages": [bot("a")]}, "no turn to answer"),
        ({"prompt": []}, "prompt is empty"),
        ({"chosen": "The capital is Paris.", "rejected": "The capital is Rome."}, "no known format of a prompt"),
    ],
)
def test_a_row_without_a_prompt_names_its_line(row, said, tokenizer):
    with pytest.raises(DataError, match=rf"rows\.jsonl:7.*{said}"):
        encode_prompt(Row("rows.jsonl:7", row), ChatEncoder(tokenizer))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_files_of_every_kind(name, tmp_path):
    rows = [{"prompt": ASKED, "answer": "a"}, {"prompt": [user("r")], "answer": "b"}]
    path, text = tmp_path / name, "".join(json.dumps(row) + "\n" for row in rows).encode()
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert read_rows(path) == [Row(f"{path}:{number}", row) for number, row in enumerate(rows, start=1)]


# --- reinforcement learning -------------------------------------------------------------------------------------------

GOOD, BAD = {"prompt": ASKED, "answer": "a"}, b'{"prompt": "\xff"}'


def recipe_of(tmp_path, *rows, **keys):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (tmp_path / "prompts.jsonl").write_bytes(b"\n".join(lines))
    stated = {"eval_datasets": [], "eval_decode_prompts": 0, "output_dir": f"{tmp_path}/run", **keys}
    words = [f"datasets=[{{path: {tmp_path}/prompts.jsonl}}]", *(f"{name}={value}" for name, value in stated.items())]
    return [str(ROOT / "recipes/quickstart/rl.yaml"), "model_name_or_path=tiny", *words]


def stream(*words):
    return PromptStream(load_recipe(words[0], list(words[1:])))


def test_bad_prompts_are_skipped_and_counted_as_records_are(tmp_path):
    long = {"prompt": "word " * 3000}
    rows = [GOOD, BAD, {"answer": "a"}, b"{", GOOD, long, [1]]
    with pytest.raises(DataError, match=r"prompts.jsonl:2: .*not UTF-8.*on_bad_row: skip"):
        stream(*recipe_of(tmp_path, *rows))
    with pytest.raises(DataError, match=r"71.43% of the rows .* max_bad_fraction is 0.5"):
        stream(*recipe_of(tmp_path, *rows, on_bad_row="skip", max_bad_fraction=0.5))
    prompts = stream(*recipe_of(tmp_path, *rows, on_bad_row="skip", max_bad_fraction=0.8))
    assert [row.origin.rpartition(":")[2] for row in prompts.rows] == ["1", "5"]
    assert prompts.report.num_refused == 5
    assert "prompts.jsonl:6: the prompt has" in str(prompts.report)
    with pytest.raises(DataError, match=r"no row of .*prompts.jsonl is a prompt"):
        stream(*recipe_of(tmp_path, BAD, on_bad_row="skip", max_bad_fraction=1.0))


@pytest.mark.parametrize("verb", ["train", "check"])
def test_a_data_error_reaches_the_user_before_ray_starts(verb, tmp_path, capsys):
    status = main([verb, *recipe_of(tmp_path, GOOD, {"prompt": 3})])
    assert status == 1
    assert "prompts.jsonl:2: prompt is int 3" in " ".join("".join(capsys.readouterr()).split())
    assert not (tmp_path / "run").exists()


def test_a_set_of_prompts_with_answers_is_an_evaluation_set(tmp_path, capsys):
    (tmp_path / "held.jsonl").write_text(
        "".join(json.dumps({"prompt": [user(f"{n}")], "answer": f"{n}"}) + "\n" for n in "12")
    )
    words = recipe_of(tmp_path, GOOD, eval_datasets=f"[{{path: {tmp_path}/held.jsonl}}]", eval_decode_prompts=2)
    assert main(["check", *words]) == 0
