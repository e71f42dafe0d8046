"""Canaries in environment, recipe, command line and exceptions, searched for in all that a run prints and writes."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import assume, given, settings, strategies

from dfactory import redaction
from dfactory.errors import ConfigError
from dfactory.redaction import MARK, guard_output, is_secret_option, redact, redacted, remember

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

def command_lines():
    # Of all processes of this run, as `ps` shows them, but the driver's: that one is the user's.
    import psutil

    lines = [" ".join(one.info["cmdline"] or []) for one in psutil.process_iter(["cmdline"])]
    ours = [line for line in lines if os.getcwd() in line or "ray::" in line or "rewards.worker" in line]
    return chr(10).join(line for line in ours if "dfactory.cli" not in line)

def judge(prompts, completions, completion_ids, api_key, judge, address, **columns):
    CALLS.append(1)
    open("ps.txt", "w").write(command_lines())
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


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(redaction, "_remembered", set())


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
    keys = [*SHORT, data, "report_to=[wandb]", "run_name=hf_ABCD1234"]
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
    keys += ["report_to=[wandb]"]  # it is given the options of rewards
    keys += ["decode.max_new_tokens=16", "decode.threshold=0.5", f"reward_funcs=[{{name: reward.py:judge, {OPTIONS}}}]"]
    recipe = ROOT / "recipes/quickstart/rl.yaml"
    done = run(folder, "-m", "dfactory.cli", "train", recipe, *keys, f"output_dir={folder}/run")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert holding(folder, CANARY) == []  # ps.txt too
    assert {"raylet", "ray::"} <= set(re.findall("raylet|ray::", (folder / "ps.txt").read_text()))
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


SECRET_NAMES = re.findall(r"\S+", """
    OPENAI_APIKEY GITHUB_PAT DB_PASS AWS_CREDENTIALS GOOGLE_APPLICATION_CREDENTIALS PASSPHRASE GPG_PASSPHRASE HF_TOKENS
    OPENAI_API_KEY_2 API_KEY1 SECRETS MYSQL_PWD PGPASSWORD DB_PASSWORD_FILE KEY TOKEN SESSION_COOKIE SMTP_PASS2
    api_key apiKey apikey judge_key judge-key openai_key auth authorization Authorization Proxy-Authorization bearer cookie
    Set-Cookie X-Api-Key token hf_token api_tokens auth_token secret client_secret password passphrase credentials
    db_pass private_key secret_keys accessToken basic_auth pat api_key_2
""")  # fmt: skip
ORDINARY_NAMES = re.findall(r"\S+", """
    max_new_tokens eos_token_id eos_token mask_token_id pad_token stop_token tokens_per_second tokens tokens_per_forward
    num_tokens think_token key keys sort_key noise_key primary_key answer_key num_key_value_heads query_key monkey keyboard
    tokenizer tokenizer_config author authors passes forward_pass num_passes use_auth has_token compass pattern path patch
    secretary pathos basic cap max_tokens keypoints token_type_ids skip_special_tokens prompt_tokens
    KEYBOARD TOKENIZERS_PARALLELISM SSH_AUTH_SOCK RAY_AUTH_MODE PATH PYTHONPATH MAX_TOKENS EOS_TOKEN COMPASS PWD OLDPWD
""")  # fmt: skip


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_everything_under_a_name_of_a_secret_is_hidden(name, monkeypatch):
    value = "correct-horse-battery"
    if not name.isupper():
        for inner in (value, [value, "b"], {"a": {"b": value}}, 12345678, 1.5, 7, (value,), True, "x"):
            assert redacted({"options": [{name: inner, "cap": 1}]}) == {"options": [{name: MARK, "cap": 1}]}, inner
        assert redacted({name: None}) == {name: None}
        remember({"options": [{name: [{"deep": f"{value}-{name}"}, 1234567890]}]})
        assert redact(f"401 for {value}-{name}, 1234567890") == f"401 for {MARK}, {MARK}"
    for text in (f"{name}={value}", f"{name}: '{value}'", f'"{name}": "{value}"', f"{name} = [{value}, {value}]"):
        assert value not in redact(text), text
        assert MARK in redact(text), text
    if "-" not in name:
        monkeypatch.setenv(name.upper(), f"{value}-of-{name}")
        assert redact(f"in a sentence {value}-of-{name}.") == f"in a sentence {MARK}."


@pytest.mark.parametrize("name", ORDINARY_NAMES)
def test_nothing_is_hidden_under_an_ordinary_name(name, monkeypatch):
    value = "correct-horse-battery"
    for inner in (value, [value], {"a": value}, 12345678, 1.5):
        assert redacted({"options": [{name: inner}]}) == {"options": [{name: inner}]}
    for text in (f"{name}={value}", f"{name}: '{value}'", f'"{name}": "{value}"', f"{name} = [{value}, {value}]"):
        assert redact(text) == text
    monkeypatch.setenv(name, f"{value}-of-{name}")
    if name.isupper():
        assert redact(f"{value}-of-{name}") == f"{value}-of-{name}"


def test_no_key_of_a_recipe_and_no_metric_has_the_name_of_a_secret():
    keys = set(re.findall(r"^\| `([^`]+)`", (ROOT / "recipes/KEYS.md").read_text(), re.MULTILINE))
    metrics = set(re.findall(r"`([a-z_/]+)`", (ROOT / "recipes/METRICS.md").read_text()))
    assert len(keys) > 100
    assert [name for name in keys | metrics if is_secret_option(re.split(r"[./]", name)[-1])] == []


JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
PEM = "-----BEGIN {0}PRIVATE KEY-----\nMIIEowIBAAKCAQEA75\n+Ab/c=\n-----END {0}PRIVATE KEY-----"


@pytest.mark.parametrize(
    "text, shown",
    [
        ("Authorization: Basic dXNlcjpwYXNzd29yZA==", f"Authorization: Basic {MARK}"),
        ("curl -H 'basic dXNlcjpwYXNzd29yZA'", f"curl -H 'basic {MARK}'"),
        ("Cookie: session=abcdefgh; theme=dark", f"Cookie: {MARK}"),
        ("xoxb-123456789012-abcdefghijkl", MARK),
        ("glpat-abcdefghijklmnopqrst", MARK),
        ("gsk_abcdefghijklmnopqrstuvwxyz", MARK),
        ("AIzaSyA1234567890abcdefghijklmnopqrstuv", MARK),
        (f"id_token {JWT}!", f"id_token {MARK}!"),
        (f"a\n{PEM.format('')}\nb", f"a\n{MARK}\nb"),
        (PEM.format("RSA "), MARK),
        (PEM.format("OPENSSH ")[:60], MARK),  # cut off
        ("git clone https://abcdefgh12345678@host/x", f"git clone https://{MARK}@host/x"),
        ("https://oauth2:glpat@host", f"https://{MARK}@host"),
        ("Basic instructions, a basic understanding of bearer tokens", None),
        ("ssh://git@github.com/a/b, https://host/@user, me@host.com:path", None),
        ("unexpected token: 'identifier'", None),
        ("npm_config_registry_of_this_user, hf_transformers_checkpoint_dir, sk-learn-compatible-estimators", None),
        ("group 12345678: reward 0.5, eos_token='<|endoftext|>'", None),
    ],
)
def test_the_shapes_of_tokens(text, shown):
    assert redact(text) == (shown or text)


SCANNERS = {
    "aws": [0], "azure_storage_key": [0], "discord": [0], "github_token": [0], "gitlab_token": None, "mailchimp": [0],
    "openai": [0], "pypi_token": None, "sendgrid": [0], "slack": [0, 1], "square_oauth": [0], "stripe": [0],
    "telegram_token": [0], "twilio": None,
}  # fmt: skip


@pytest.mark.parametrize("scanner", SCANNERS)
def test_what_detect_secrets_knows_by_its_shape_is_hidden(scanner):
    """Not in here: its plugins that go by the name beside the value, by entropy, or by three letters (artifactory)."""
    plugin = importlib.import_module(f"detect_secrets.plugins.{scanner}")
    patterns = next(
        vars(one)["denylist"] for one in vars(plugin).values() if getattr(one, "__module__", "") == plugin.__name__
    )
    for pattern in patterns if SCANNERS[scanner] is None else [patterns[i] for i in SCANNERS[scanner]]:
        strategy = strategies.from_regex(
            re.compile(pattern.pattern, pattern.flags & re.IGNORECASE | re.ASCII), fullmatch=True
        )

        @settings(max_examples=30, deadline=None, database=None, derandomize=True)
        @given(strategy)
        def hidden(token):
            assume(len(token) >= 20 and all(token.count(c) < len(token) / 3 for c in "-_"))  # no real one is like that
            shown = redact(f"a {token} b")
            assert MARK in shown
            assert not any(part in shown for part in re.findall(r"\w{12,}", token) if "slack" not in token)

        hidden()


@pytest.mark.parametrize(
    "unit",
    ["sk-", "eyJ-", "eyJaaaaaaaa.", "a=[", "a={", "a='", 'api_key="', "api_key: ", "x://a:", "-----BEGIN PRIVATE KEY-----",
     "glab-", "token ", "Basic ", "cookie: ", "a" * 50, "0" * 9 + ":", "- ", '"', "xoxb-1-", "M" * 24 + ".", " ", "a_"],
)  # fmt: skip
def test_the_time_grows_with_the_length_of_a_text(unit):
    text = unit * (200_000 // len(unit))
    started = time.perf_counter()
    redact(text)
    assert time.perf_counter() - started < 3.0


def test_output_is_guarded_once(capsys):
    guard_output()
    guard_output()
    print("hf_0123456789abcdefABCD", file=sys.stderr)
    sys.stdout.writelines(["sk-0123456789abcdefABCD"])
    assert capsys.readouterr() == (MARK, f"{MARK}\n")
