"""What is installed: one package, whose name cannot collide, and whose commands work outside of a checkout."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")
FOLDERS = ("benchmarks", "data_tools", "dfactory", "docs", "examples", "launch", "recipes", "tests", ".ci")
BUILD = "import setuptools.build_meta as backend, sys; getattr(backend, sys.argv[1])(sys.argv[2])"


def build(what: str, source: Path, target: Path) -> Path:
    """A `wheel` or `sdist` of the source folder, unpacked into `target`; the folder that holds it."""
    target.mkdir(exist_ok=True)
    subprocess.run(
        [sys.executable, "-c", BUILD, f"build_{what}", str(target)], cwd=source, check=True, capture_output=True
    )
    (made,) = target.iterdir()
    if what == "wheel":
        with zipfile.ZipFile(made) as file:
            file.extractall(target)
    else:
        with tarfile.open(made) as file:
            file.extractall(target, filter="data")
    made.unlink()
    return target


def files(folder: Path) -> set[str]:
    """Without those that say how it was packed."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if path.name not in ("RECORD", "SOURCES.txt")}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout, so that building leaves nothing in it."""
    copy = tmp_path_factory.mktemp("source")
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def installed(source, tmp_path_factory):
    """The folder of an unpacked wheel."""
    return build("wheel", source, tmp_path_factory.mktemp("installed"))


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
    assert (installed / "dfactory/py.typed").is_file()
    assert not list(installed.rglob("make_quickstart*"))


def test_the_recipes_are_installed_as_they_are(installed):
    folder = installed / "dfactory/recipes"
    assert files(folder) == {path for path in files(ROOT / "recipes") if not path.startswith("actions/data/")}
    assert (folder / "quickstart/expected.json").read_bytes() == (
        ROOT / "recipes/quickstart/expected.json"
    ).read_bytes()


def test_the_wheel_of_an_sdist_is_that_of_the_checkout(source, installed, tmp_path):
    (unpacked,) = build("sdist", source, tmp_path / "sdist").iterdir()
    assert (unpacked / "launch/install.sh").is_file()
    assert (unpacked / "tests/golden/llada2_tiny/model.safetensors").is_file()
    again = build("wheel", unpacked, tmp_path / "wheel")
    assert files(again) == files(installed) - {path for path in files(installed) if "__pycache__" in path}


def test_a_recipe_of_the_wheel_is_checked_elsewhere(installed, tmp_path):
    """The quickstart's first stage, with the embedded model and its records, without a checkout."""
    assert run(installed, tmp_path, "recipes", "--output", "recipes").returncode == 0
    done = run(installed, tmp_path, "check", "recipes/quickstart/sft.yaml")
    assert done.returncode == 0, done.stderr
    assert "recipes/quickstart/data/train.jsonl" in done.stdout
    done = run(installed, tmp_path, "doctor")
    assert (done.returncode, f"{installed}/dfactory/recipes" in done.stdout) == (0, True)


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
