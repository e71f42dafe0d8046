"""What a model was made from, as data: written, read back, refused where it is damaged; sums of files beside a run."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from dfactory.errors import CheckpointError, DataError
from dfactory.redaction import MARK, shareable
from dfactory.runs import hashing
from dfactory.runs.evaluations import evaluations_at, evaluations_of, record
from dfactory.runs.hashing import CHANGED, NOT_YET, Hashes, hash_file
from dfactory.runs.lineage import (
    FILE,
    Averaged,
    Base,
    Earlier,
    Evaluation,
    Export,
    Licence,
    Lineage,
    Records,
    Result,
    Source,
    Training,
    read_lineage,
)
from dfactory.runs.provenance import base_of, lineage_of

EVALUATION = Evaluation(
    2, "2026-01-02", "dfactory eval", "q.jsonl", "ab", {"rule": "x"}, [Result("m", 0.5, "p", 0.1, 0.9, 8)]
)
TRAINING = Training(
    "a",
    "run",
    Source("base", None, {"model.safetensors": "00"}),
    "lr: 1\n",
    2,
    [Earlier(1, "lr: 2\n")],
    10,
    1.5,
    [Records("x.jsonl", "training", 0.5, 3, "ff"), Records("o/s", "held out", on_hub=True, split="train")],
    {"torch": "2"},
    ["a CPU"],
    {"step": 1.0},
    {"step": 2.0},
    [EVALUATION],
)
EXPORT = Export(
    "out", Source("run/checkpoint-2"), "float32", "1", True, "eval/loss", [Averaged("checkpoint-2", 0.1)], "mit"
)
WHOLE = Lineage(Base("hub", "o/n", "0" * 40, licence=Licence("x")), (TRAINING, EXPORT))


def write(folder: Path, **changes) -> Path:
    raw = json.loads(WHOLE.text())
    (folder / FILE).write_text(json.dumps(raw | changes))
    return folder


def test_what_is_written_is_read(tmp_path):
    (tmp_path / FILE).write_text(WHOLE.text())
    assert read_lineage(tmp_path) == WHOLE
    assert WHOLE.licence == Licence("mit")
    assert dataclasses.replace(WHOLE, history=(TRAINING,)).licence == Licence("x")


def test_fields_of_a_later_version_are_left_out(tmp_path):
    raw = json.loads(WHOLE.text())
    raw["base"]["colour"] = raw["colour"] = raw["history"][0]["training"]["colour"] = "red"
    (tmp_path / FILE).write_text(json.dumps(raw))
    assert read_lineage(tmp_path) == WHOLE


def test_none_and_that_of_another_program(tmp_path):
    assert read_lineage(tmp_path) is None
    for text in ('{"format": 1}', "[]", '"x"'):
        (tmp_path / FILE).write_text(text)
        assert read_lineage(tmp_path) is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"base": {"kind": "hub"}}, "base lacks name"),
        ({"base": {"kind": "hub", "name": 3}}, "base.name is '3'"),
        ({"history": "x"}, "history is 'x'"),
        ({"history": [{"dance": {}}]}, r"history holds \['dance'\], which is none of training, export"),
        ({"history": [{"export": {"name": "x"}}]}, "export lacks dtype, source, version"),
    ],
)
def test_a_damaged_one_is_named(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=f"{FILE} is no lineage of a model: {message}.*remove it"):
        read_lineage(write(tmp_path, **changes))
    (tmp_path / FILE).write_text("{")
    with pytest.raises(CheckpointError, match="it is not JSON"):
        read_lineage(tmp_path)


# --- bases -------------------------------------------------------------------------------------------------------------


def test_a_model_of_the_hub(tmp_path):
    snapshot = tmp_path / f"models--org--name/snapshots/{'a' * 40}"
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: other\nlicense_name: odd\nlanguage: [en, de]\n---\n# Name\n")
    assert base_of(snapshot) == Base(
        "hub", "org/name", "a" * 40, licence=Licence("other", "odd"), language=["en", "de"], has_card=True
    )


def test_a_model_from_a_gguf_file(tmp_path):
    """What `dfactory data gguf` writes; a path in it is told by name."""
    told = {
        "source": "gguf",
        "file": "/home/joe/x.gguf",
        "sha256": "ab",
        "quantisation": "Q8_0",
        "license": "apache-2.0",
    }
    (tmp_path / "provenance.json").write_text(json.dumps(told | {"name": "Smol"}))
    found = lineage_of(tmp_path).base
    assert (found.kind, found.name, found.licence.license) == ("gguf", "Smol", "apache-2.0")
    assert found.gguf == {"file": "x.gguf", "sha256": "ab", "quantisation": "Q8_0"}
    (tmp_path / "provenance.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"provenance\.json is not JSON"):
        base_of(tmp_path)


@pytest.mark.parametrize(
    "card", ["no front matter", "---\n- a\n- list\n---\n", "---\nlicense: [1\n---\n", "---\nlicense: 3\n---\n"]
)
def test_a_licence_that_a_card_does_not_state_is_unknown(tmp_path, card):
    (tmp_path / "README.md").write_text(card)
    assert base_of(tmp_path).licence == Licence()


# --- evaluations -------------------------------------------------------------------------------------------------------


def test_evaluations_are_kept_by_step_and_the_last_of_a_command_counts(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    later = dataclasses.replace(EVALUATION, date="2026-02-03")
    for step, one in ((1, EVALUATION), (2, EVALUATION), (2, later)):
        (tmp_path / f"checkpoint-{step}").mkdir(exist_ok=True)
        record(tmp_path / f"checkpoint-{step}", one)
    assert [one.step for one in evaluations_of(tmp_path)] == [1, 2]
    assert evaluations_at(tmp_path, 2) == [later]
    with (tmp_path / "evaluations.jsonl").open("a") as file:
        file.write('{"step": "x"}\n')
    with pytest.raises(DataError, match=r"evaluations.jsonl:4 is no evaluation \(the line.step is 'x'\)"):
        evaluations_of(tmp_path)


# --- sums of files -----------------------------------------------------------------------------------------------------


def test_files_are_hashed_beside_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(hashing, "PIECE", 5)
    file, other = tmp_path / "a.jsonl", tmp_path / "missing"
    file.write_bytes(b'{"a": 1}\n\n{"b": 2}')
    hashes = Hashes([file, other])
    hashes.wait()
    assert hashes.of(file) == (hashlib.sha256(file.read_bytes()).hexdigest(), 3, "")
    assert hashes.of(other).note == "not hashed: No such file or directory"
    assert hashes.of(tmp_path / "another").note == NOT_YET
    assert hash_file(tmp_path).sha256 is None


def test_a_file_that_changes_meanwhile_has_no_sum(tmp_path, monkeypatch):
    file = tmp_path / "a"
    file.write_text("1")

    def then_append(path):
        path.write_text("12")
        return hash_file(path)

    monkeypatch.setattr(hashing, "hash_file", then_append)
    hashes = Hashes([file])
    hashes.wait()
    assert hashes.of(file) == (None, None, CHANGED)


# --- what may leave the machine ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, shown",
    [
        ("/home/joe/set/data.jsonl", "data.jsonl"),
        ("~/set/data.jsonl", "data.jsonl"),
        ("../joe/data.jsonl", "data.jsonl"),
        ("C:\\Users\\joe\\data.jsonl", "data.jsonl"),
        ("/home/joe/rewards.py:right", "rewards.py:right"),
        ("--data=/home/joe/d.jsonl", "--data=d.jsonl"),
        ("datasets=[{path: /home/joe/d.jsonl}]", "datasets=[{path: d.jsonl}]"),
        ("http://gpu7.lan:8000/v1", f"http://{MARK}/v1"),
        ("hf_" + "a" * 30, MARK),
        ("runs/mine", "runs/mine"),
        ("org/name", "org/name"),
        ("^<a>.*</a>/x/y$", "^<a>.*</a>/x/y$"),
        ("/", "/"),
    ],
)
def test_paths_hosts_and_secrets_stay_here(text, shown):
    assert shareable(text) == shown
    assert shareable({"a": [text, 1, None]}) == {"a": [shown, 1, None]}


def test_paths_in_the_working_directory_are_relative_to_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shareable(str(tmp_path / "runs/mine")) == "runs/mine"
    assert shareable(str(tmp_path)) == tmp_path.name
    monkeypatch.chdir("/")
    assert shareable("/home/joe/runs/mine") == "mine"
    assert shareable({"api_key": "12345678", "path": "/a/b"}) == {"api_key": MARK, "path": "b"}
