"""A model and records by their names on the hub: checked and trained, with the hub and then without it from the cache.

The hub is a stand-in on 127.0.0.1 (tests/hub.py); huggingface_hub learns of it, and of an empty HF_HOME, in a process of its
own, because it reads both when it is imported.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dfactory.models.tiny import TINY_DIR
from tests.hub import commit_of, serving

ROOT = Path(__file__).parents[1]
MODEL, RECORDS = "acme/tiny-dlm", "acme/tiny-chat"
CALL = "import json, sys; from dfactory.cli import main; print([main(words) for words in json.loads(sys.argv[1])])"
CONVERSATION = {"messages": [{"role": "user", "content": "Say hi"}, {"role": "assistant", "content": "hi"}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the hub serves."""
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(TINY_DIR, root / "models" / MODEL)
    (root / "models" / MODEL / "pytorch_model.bin").write_bytes(b"nobody needs this")
    data = root / "datasets" / RECORDS / "data"
    data.mkdir(parents=True)
    (data / "train.jsonl").write_text(f"{json.dumps(CONVERSATION)}\n" * 16)
    (data / "test.jsonl").write_text(f"{json.dumps(CONVERSATION)}\n" * 3 + f"{json.dumps({'messages': []})}\n")
    return root


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """An empty HF_HOME, which the tests of this file fill one after the other."""
    return tmp_path_factory.mktemp("home")


def python(home, code, *words, **variables):
    """A process of its own that has ended well."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(home), **variables}
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def call(home, *commands, **variables):
    """([exit status, ...], what was printed, as one line) of dfactory's command lines in one process."""
    done = python(home, CALL, json.dumps(commands), **variables)
    *told, statuses = done.stdout.strip().splitlines()
    return json.loads(statuses), " ".join(" ".join([*told, done.stderr]).split())


def recipe(tmp_path, *changes):
    file = tmp_path / "recipe.yaml"
    keys = {
        "model_name_or_path": MODEL,
        "dtype": "float32",
        "datasets": [{"name": RECORDS, "split": "train"}],
        "block_size": 8,
        "max_length": 32,
        "max_steps": 2,
        "output_dir": str(tmp_path / "run"),
    }
    file.write_text(json.dumps(keys))
    return [str(file), *changes]


@pytest.mark.slow
def test_a_model_of_the_hub_trains_and_then_trains_from_the_cache(folder, home, tmp_path):
    words, commit = recipe(tmp_path), commit_of(folder / "models" / MODEL)
    with serving(folder) as hub:
        statuses, told = call(home, ["check", *words], ["train", *words], HF_ENDPOINT=hub.endpoint)
    assert statuses == [0, 0]
    assert "not downloaded yet" in told
    assert f"16 documents of {RECORDS}[train]" in told
    asked = [path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path]
    assert asked.index("model.safetensors") > asked.index("tokenizer.json")
    assert "pytorch_model.bin" not in asked
    (snapshot,) = (home / "hub").glob("models--acme--tiny-dlm/snapshots/*")
    assert snapshot.name == commit

    pinned = [*words, f"model_revision={commit}", "use_peft=true", "streaming=true", f"output_dir={tmp_path / 'again'}"]
    statuses, told = call(home, ["check", *pinned], ["train", *pinned], HF_HUB_OFFLINE="1")
    assert statuses == [0, 0]
    assert "not downloaded yet" not in told
    adapters = json.loads((tmp_path / "again/checkpoint-2/adapter_config.json").read_text())
    assert (adapters["base_model_name_or_path"], adapters["revision"]) == (MODEL, commit)  # no path of this machine

    (tmp_path / "ask.jsonl").write_text(json.dumps({"prompt": "Say hi"}) + "\n")
    ask = ["generate", "--input", str(tmp_path / "ask.jsonl"), "--output", str(tmp_path / "answers.jsonl"), "--model"]
    models = (f"{MODEL}@{commit}", str(tmp_path / "again"))
    assert call(home, *([*ask, model] for model in models), HF_HUB_OFFLINE="1")[0] == [0, 0]
    code = f"import dfactory; print(dfactory.Pipeline({MODEL!r}, revision={commit!r}).policy.source_dir)"
    assert python(home, code, HF_HUB_OFFLINE="1").stdout.strip() == str(snapshot)


@pytest.mark.slow
def test_an_export_is_uploaded_with_its_card_and_loads_by_its_name(folder, tmp_path):
    """Once with a token that may not write, whose text is nowhere; then into a new private repository, and again."""
    home, out = tmp_path / "home", tmp_path / "out"
    push = ["export", "--model", "tiny", "--push-to-hub", "acme/pushed", "--private", "--output"]
    elsewhere = ["export", "--model", "tiny", "--push-to-hub", "others/x", "--output", str(tmp_path / "kept")]
    with serving(folder) as hub:
        online = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"}
        statuses, told = call(home, [*push, str(out)], **online)
        assert (statuses, "there is no token; give one that may write, in HF_TOKEN" in told) == ([2], True)
        statuses, told = call(home, [*push, str(out)], HF_TOKEN="wrong-token-of-the-test", **online)
        assert (statuses, "the hub does not accept the token" in told, out.exists()) == ([2], True, False)
        assert "wrong-token" not in told
        statuses, told = call(home, [*push, str(out)], elsewhere, HF_TOKEN=hub.token, **online)
        assert statuses == [0, 2]
        commit = commit_of(folder / "models/acme/pushed")
        assert f"uploaded: {hub.endpoint}/acme/pushed/commit/{commit}" in told
        assert f"`hf upload others/x {tmp_path / 'kept'}` uploads it" in told
        assert hub.visibility == {"acme/pushed": "private"}
        ask = ["generate", "--input", str(tmp_path / "ask.jsonl"), "--output", str(tmp_path / "a.jsonl"), "--model"]
        (tmp_path / "ask.jsonl").write_text(json.dumps({"prompt": "Say hi"}) + "\n")
        statuses, _ = call(
            home, [*ask, "acme/pushed@main"], [*push, str(tmp_path / "again")], HF_TOKEN=hub.token, **online
        )
        assert statuses == [0, 0]
    pushed = folder / "models/acme/pushed"
    assert {file.name: file.read_bytes() for file in out.iterdir()} == {
        f.name: f.read_bytes() for f in pushed.iterdir()
    }
    assert 'dfactory.Pipeline("acme/pushed"' in (pushed / "README.md").read_text()
    written = [file for file in (*tmp_path.rglob("*"), *pushed.rglob("*")) if file.is_file()]
    assert not [file for file in written if hub.token.encode() in file.read_bytes()]


@pytest.mark.slow
def test_private_repositories_are_read_with_the_usual_variables(folder, tmp_path):
    """A model and records, by their names in place of paths; without the token, and with a wrong one, the remedy is told."""
    shutil.copytree(folder / "models" / MODEL, folder / "models/secret/dlm")
    shutil.copytree(folder / "datasets" / RECORDS, folder / "datasets/secret/chat")
    home = tmp_path / "home"
    (tmp_path / "token").write_text("right-token-of-the-test")
    convert = ["data", "convert", "secret/chat@main[train]", "--output", str(tmp_path / "chat.jsonl")]
    count = ["data", "token-count", "secret/chat", "--model", "secret/dlm", "--chat-template", "secret/dlm@main"]
    answers = ["generate", "--model", "secret/dlm", "--input", "secret/chat", "--output", str(tmp_path / "a.jsonl")]
    bound = ["eval", "--model", "secret/dlm", "--data", "secret/chat", "--elbo-pairs", "1"]
    with serving(folder) as hub:
        online = {"HF_ENDPOINT": hub.endpoint}
        statuses, told = call(home, count, convert, **online)
        assert statuses == [2, 2]
        assert told.count("give your token in HF_TOKEN") == 2
        statuses, told = call(home, count, HF_TOKEN="wrong-token-of-the-test", **online)
        assert statuses == [2]
        assert "the hub does not accept the token" in told
        verbs = (count, convert, answers, bound)
        statuses, told = call(home, *verbs, HF_TOKEN_PATH=str(tmp_path / "token"), **online)
        assert statuses == [0, 0, 0, 0]
        assert "16 rows" in told
        assert hub.token not in told
    assert len((tmp_path / "chat.jsonl").read_text().splitlines()) == 16


@pytest.mark.slow
def test_what_the_hub_does_not_give_is_told_with_a_remedy(folder, tmp_path):
    home, words = tmp_path / "home", recipe(tmp_path)
    with serving(folder) as hub:
        data = ("name: acme/none", f"name: {RECORDS}, split: nope", f"name: {RECORDS}, split: test")
        wrong = ["model_name_or_path=acme/none", "model_revision=v2"]
        wrong += [f"datasets=[{{{entry}}}] model_name_or_path=tiny" for entry in data]
        commands = (["train", *words, *re.split(r" (?=model)", keys)] for keys in wrong)
        statuses, told = call(home, *commands, HF_ENDPOINT=hub.endpoint)
    assert statuses == [2, 2, 2, 2, 1]
    known = f"is not a local path and cannot be read from {hub.endpoint}: "
    assert f"model_name_or_path acme/none {known}there is no such repository" in told
    assert f"model_name_or_path {MODEL} {known}it has no revision v2" in told
    unread = f"cannot be read from {hub.endpoint}: "
    assert f"datasets.name acme/none[train] {unread}Dataset 'acme/none' doesn't exist on the Hub" in told
    assert f"datasets.name {RECORDS}[nope] {unread}" in told
    assert "Should be one of ['train', 'test']" in told
    assert f"{RECORDS}[test]:4: messages" in told
    empty, local = tmp_path / "empty", ["check", *words, "model_name_or_path=tiny"]
    statuses, told = call(empty, ["check", *words], local, HF_ENDPOINT=hub.endpoint)  # the server is down
    assert statuses == [2, 2]
    assert f"datasets.name {RECORDS}[train] {unread}the server does not answer" in told
    assert f"model_name_or_path {MODEL} {known}the server does not answer" in told
    assert "set HF_ENDPOINT to a mirror" in told
    statuses, told = call(empty, ["check", *words], local, HF_HUB_OFFLINE="1")
    assert statuses == [2, 2]
    for name in (f"model_name_or_path {MODEL} is not a local path and", f"datasets.name {RECORDS}[train]"):
        assert (
            f"{name} cannot be read from https://huggingface.co: HF_HUB_OFFLINE is set, and the cache {empty}" in told
        )
