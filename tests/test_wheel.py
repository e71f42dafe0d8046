"""What is installed: one package, whose name cannot collide, and whose commands work outside of a checkout."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")
BUILD = "import setuptools.build_meta as backend, sys; backend.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of an unpacked wheel, built from a copy so that nothing is left in the checkout."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in SOURCES:
        shutil.copy(ROOT / name, source / name)
    for name in ("dfactory", "data_tools", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-c", BUILD, str(target)], cwd=source, check=True, capture_output=True)
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(target)
    wheel.unlink()
    return target


def run(installed, cwd, *words):
    """`dfactory WORDS` of the unpacked wheel, started elsewhere."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "dfactory.cli", *map(str, words)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )


def test_only_dfactory_is_installed_with_its_assets(installed):
    packages = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert packages == {"dfactory"}
    assert (installed / "dfactory/assets/tiny/tokenizer.json").is_file()
    assert not list(installed.rglob("make_quickstart*"))


def test_data_tools_work_outside_of_a_checkout(installed, tmp_path):
    row = {"instruction": "hi", "output": "yo"}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    done = run(installed, tmp_path, "data", "convert", "in.jsonl", "--output", "out.jsonl")
    assert (done.returncode, done.stderr) == (0, "1 conversations: out.jsonl\n")
    assert json.loads((tmp_path / "out.jsonl").read_text())["messages"][1]["content"] == "yo"
    done = run(installed, tmp_path, "data", "validate", "in.jsonl")
    assert (done.returncode, "0 of 1 rows are bad" in done.stdout) == (0, True)
    done = run(installed, tmp_path, "data", "fly")
    assert (done.returncode, "fly is not a data tool" in done.stderr) == (2, True)


def test_benchmarks_say_that_they_are_part_of_a_checkout(installed, tmp_path):
    done = run(installed, tmp_path, "bench", "step")
    assert (done.returncode, "not installed with it" in done.stderr) == (2, True)
