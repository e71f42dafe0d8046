"""A real server in a process of its own, with the embedded tokenizer and random weights: those never say EOS."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from dfactory.inference import Pipeline

ROOT = Path(__file__).parents[2]
MODEL = ("--model", "tiny", "--init-weights", "random")
KEYS = {"block_size": 8, "max_new_tokens": 40, "threshold": 0.001}
STARTS_WITHIN_S = 180
TOKEN = "0123456789abcdef"


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: dict

    @property
    def message(self) -> str:
        return self.body["error"]["message"]


class Server(NamedTuple):
    process: subprocess.Popen
    url: str
    log: Path

    def ask(self, path: str, body: dict | str | None = None, headers: dict[str, str] | None = None) -> Reply:
        """GET, or POST where there is a body; any status is an answer."""
        data = body if body is None or isinstance(body, str) else json.dumps(body)
        headers = {"Content-Type": "application/json"} | (headers or {})
        request = urllib.request.Request(self.url + path, data and data.encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return Reply(response.status, dict(response.headers), json.loads(response.read()))
        except urllib.error.HTTPError as refused:
            return Reply(refused.code, dict(refused.headers), json.loads(refused.read()))

    def number(self, name: str, headers: dict[str, str] | None = None) -> float:
        """A value of /metrics."""
        request = urllib.request.Request(f"{self.url}/metrics", headers=headers or {})
        with urllib.request.urlopen(request, timeout=60) as response:
            text = response.read().decode()
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE).group(1))

    def wait_for(self, name: str, value: float) -> None:
        ends = time.monotonic() + 60
        while self.number(name) != value:
            assert time.monotonic() < ends, f"{name} is {self.number(name)}, not {value}"
            time.sleep(0.02)


@contextlib.contextmanager
def serving(folder: Path, *words: str, token: str | None = None, **keys) -> Iterator[Server]:
    """`dfactory serve` on a free port."""
    keys = [f"decode.{name}={value}" for name, value in (KEYS | keys).items()]
    command = [sys.executable, "-m", "dfactory.cli", "serve", *MODEL, "--port", "0", "--model-name", "small"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"DFACTORY_SERVE_TOKEN": token} if token else {})
    log = folder / "serve.log"
    with log.open("w") as file:
        process = subprocess.Popen([*command, *words, *keys], cwd=ROOT, env=environment, stderr=file)
    try:
        ends = time.monotonic() + STARTS_WITHIN_S
        while not (found := re.search(r"on (http://\S+),", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < ends, log.read_text()
            time.sleep(0.05)
        yield Server(process, found.group(1).replace("0.0.0.0", "127.0.0.1"), log)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server"), "--max-length", "256", batch_size=3) as server:
        yield server


@pytest.fixture(scope="session")
def guarded(tmp_path_factory) -> Iterator[Server]:
    """A server that asks for TOKEN and has a second model, `tiny`."""
    words = ("--max-length", "64", "--beside", "tiny")
    with serving(tmp_path_factory.mktemp("guarded"), *words, token=TOKEN, batch_size=1, max_new_tokens=16) as server:
        yield server


@pytest.fixture(scope="session")
def pipeline() -> Pipeline:
    """The same model in this process."""
    return Pipeline("tiny", init_weights="random", device="cpu", **KEYS)
