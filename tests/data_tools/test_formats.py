"""Five kinds of files go from `validate` to a trained checkpoint, with no other tool between."""

import json

import pytest

from dfactory.cli import main
from tests.test_assets import DATA

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}


def said(role, content, **further):
    return {"role": role, "content": content, **further}


def alpaca(index):
    return {"instruction": "Name a word that begins with", "input": "abc"[index % 3], "output": f"apple {index}"}


def sharegpt(index):
    turns = [
        ("system", "Be brief."),
        ("human", f"Say {index}."),
        ("gpt", str(index)),
        ("human", "Once more."),
        ("gpt", "No."),
    ]
    return {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}


def openai(index):
    """The arguments of the call are JSON text, as OpenAI writes them."""
    messages = [
        said("user", f"Weather {index}?"),
        said("assistant", None, tool_calls=[CALL]),
        said("tool", "rain", tool_call_id="1"),
        said("assistant", "It rains."),
    ]
    return {"messages": messages, "tools": [TOOL]}


def preference(index):
    sides = {"chosen": [said("assistant", f"{index}.")], "rejected": [said("assistant", "I do not know.")]}
    return {"prompt": [said("user", f"Count to {index}.")], **sides}


FILES = {
    "alpaca.jsonl": (alpaca, "sft"),
    "sharegpt.jsonl": (sharegpt, "sft"),
    "openai.jsonl.gz": (openai, "sft"),
    "preference.jsonl": (preference, "dpo"),
    "openai.parquet": (openai, "sft"),
}
SMALL = ["model_name_or_path=tiny", "eval_datasets=[]", "max_length=256", "row_length=null", "max_steps=2"]
SMALL += ["warmup_steps=0", "eval_steps=null", "save_steps=null", "logging_steps=1"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_file_goes_from_validate_to_a_trained_checkpoint(name, files, tool, tmp_path):
    make_row, stage = FILES[name]
    file = files(name, *(make_row(index) for index in range(8)))
    recipe, keys = DATA.parent / f"{stage}.yaml", [*SMALL, f"datasets=[{{path: {file}}}]", f"output_dir={tmp_path}/run"]

    status, shown = tool("validate", "--recipe", recipe, *keys, "--html", tmp_path / "page.html")
    assert status == 0, shown
    assert "0 of 8 rows are bad" in shown
    assert "0 of 8 rows are bad" in (tmp_path / "page.html").read_text()

    assert main(["train", str(recipe), *keys]) == 0
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics if "loss" in row] == [1, 2]
    assert (tmp_path / "run" / "checkpoint-2" / "model.safetensors").is_file()
