"""Canaries in environment, recipe, command line and exceptions, searched for in all that a run prints and writes."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dfactory.errors import ConfigError
from dfactory.redaction import MARK, guard_output, redact, redacted, remember

ROOT = Path(__file__).parents[1]
CANARY = "CANARY"
PASSWORD = f'{CANARY}"\\pass word'
SECRETS = {
    "MY_SERVICE_TOKEN": f"{CANARY}environment",
    "DB_PASSWORD": PASSWORD,
    "RAY_AUTH_TOKEN": f"{CANARY}0123456789abcdef",
    "RAY_AUTH_MODE": "token",
}
OPTIONS = f"api_key: {CANARY}option, judge: '${{oc.env:MY_SERVICE_TOKEN}}', address: 'https://me:{CANARY}@host/'"
SHORT = [
    *("max_steps=1", "eval_datasets=[]", "eval_decode_prompts=0", "logging_steps=1", "warmup_steps=0"),
    f"deepspeed_overrides={{comet: {{enabled: false, api_key: {CANARY}tracker}}}}",
]
REWARD = """
import logging, os, sys

CALLS = []

def judge(prompts, completions, completion_ids, api_key, judge, address, **columns):
    CALLS.append(1)
    print("printed", api_key, judge)
    print("printed", api_key, os.environ["MY_SERVICE_TOKEN"], file=sys.stderr, flush=True)
    logging.warning("logged %s %s", address, os.environ["DB_PASSWORD"])
    if len(CALLS) == 2:
        raise ValueError(f"401 for {api_key} {os.environ['DB_PASSWORD']}")
    texts = [completion[0]["content"] for completion in completions]
    return [sum(letter < "N" for letter in text) - 0.1 * len(ids) for text, ids in zip(texts, completion_ids)]
"""
CRASH = """
import logging, os, sys
import dfactory.train
from dfactory.cli import main

def crash(recipe):
    logging.warning("logged %s", os.environ["DB_PASSWORD"])
    try:
        raise KeyError(os.environ["DB_PASSWORD"])
    except KeyError as problem:
        raise ValueError("401 for " + os.environ["MY_SERVICE_TOKEN"] + recipe.run_name) from problem

dfactory.train.train = crash
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def folder():
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # short: the path of a socket has at most 107 bytes
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def run(folder: Path, *words) -> subprocess.CompletedProcess:
    """A program in a folder, which is also Ray's; what it printed is checked."""
    kept = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "RANK", "RAY_ADDRESS")}
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env=kept | variables | SECRETS | {"RAY_TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert CANARY not in done.stdout + done.stderr
    return done


def holding(folder: Path, text: str) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sorted(str(path.relative_to(folder)) for path in files if text.encode() in path.read_bytes())


@pytest.mark.slow
def test_no_file_and_no_output_of_a_run_holds_a_canary(folder):
    data = f"datasets=[{{path: {ROOT}/recipes/quickstart/data/heldout.jsonl}}]"
    keys = [
        *SHORT,
        data,
        "report_to=[wandb]",
        f"reward_funcs=[{{name: exact_match, {OPTIONS}}}]",
        "run_name=hf_ABCD1234",
    ]
    recipe = ROOT / "recipes/quickstart/sft.yaml"
    done = run(folder, "-m", "dfactory.cli", "train", recipe, *keys, f"output_dir={folder}/run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert list((folder / "run").glob("wandb/offline-run-*/*.wandb"))  # which keeps the command line
    assert holding(folder, CANARY) == []
    assert "run/config.yaml" in holding(folder, MARK)
    assert f"api_key: {MARK}" in (folder / "run/config.yaml").read_text()
    assert MARK in (folder / "run/report/report.html").read_text().replace("&lt;", "<").replace("&gt;", ">")


@pytest.mark.slow
def test_no_log_of_ray_holds_a_canary(folder):
    (folder / "reward.py").write_text(REWARD)
    keys = [*SHORT, "model_name_or_path=tiny", "num_generations=4", "prompts_per_step=2", "reward_workers=1"]
    keys += ["decode.max_new_tokens=16", "decode.threshold=0.5", f"reward_funcs=[{{name: reward.py:judge, {OPTIONS}}}]"]
    recipe = ROOT / "recipes/quickstart/rl.yaml"
    done = run(folder, "-m", "dfactory.cli", "train", recipe, *keys, f"output_dir={folder}/run")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert holding(folder, CANARY) == []
    assert any(name.endswith(".out") and "/logs/" in name for name in holding(folder, MARK))  # of a Ray worker


@pytest.mark.slow
def test_a_crash_and_a_failure_print_no_canary(folder):
    (folder / "crash.py").write_text(CRASH)
    recipe = ROOT / "recipes/quickstart/sft.yaml"
    done = run(folder, "crash.py", "train", recipe, "run_name=sk-proj-0123456789abcdef")
    assert done.returncode == 1
    assert f"KeyError: '{MARK}'" in done.stderr
    assert f"ValueError: 401 for {MARK}{MARK}\n" in done.stderr
    assert f"logged {MARK}\n" in done.stderr
    done = run(folder, "-m", "dfactory.cli", "train", recipe, f"api_key={CANARY}12", f"{CANARY}environment")
    assert done.returncode == 2
    assert f"does not know {MARK}" in done.stderr


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a hf_0123456789abcdefABCD b", f"a {MARK} b"),
        ("sk-proj-0123456789abcdef", MARK),
        ("ghp_0123456789abcdef0123", MARK),
        ("https://me:word@host/x", f"https://{MARK}@host/x"),
        ("Authorization: Bearer abcdef123456", f"Authorization: Bearer {MARK}"),
        ("reward_funcs=[{api_key: abcdefgh}]", f"reward_funcs=[{{api_key: {MARK}}}]"),
        ("WANDB_API_KEY=" + "0a" * 20, f"WANDB_API_KEY={MARK}"),
        ("{'password': 'correct-horse'}", f"{{'password': '{MARK}'}}"),
        ("/hub/snapshots/" + "0a" * 20 + "/config.json", None),  # the name of a commit is none
        ("mask_token_id=158, eos_token: <|endoftext|>, sk-learn-compatible-estimators", None),
    ],
)
def test_what_looks_like_a_secret(text, shown):
    assert redact(text) == (shown or text)


def test_values_of_named_variables_however_they_are_spelt(monkeypatch):
    monkeypatch.setenv("ONE_API_KEY", PASSWORD)
    monkeypatch.setenv("OTHER_SECRET", "1")  # too short: nothing else could be read any more
    monkeypatch.setenv("KEYBOARD", "qwertyuiop")
    assert redact(f"{PASSWORD} {PASSWORD!r} 1 qwertyuiop") == f"{MARK} '{MARK}' 1 qwertyuiop"
    assert str(ConfigError(f"no {PASSWORD}")) == f"no {MARK}"


def test_values_of_named_options():
    remember([{"name": "judge", "auth_token": "one of its own", "stop_token": "<|end of it|>"}])
    assert redact("one of its own <|end of it|>") == f"{MARK} <|end of it|>"
    assert redacted({"a": [{"api_key": "x", "b": 2, "c": "one of its own"}]}) == {
        "a": [{"api_key": MARK, "b": 2, "c": MARK}]
    }


def test_output_is_guarded_once(capsys):
    guard_output()
    guard_output()
    print("hf_0123456789abcdefABCD", file=sys.stderr)
    sys.stdout.writelines(["sk-0123456789abcdefABCD"])
    assert capsys.readouterr() == (MARK, f"{MARK}\n")
