"""`dfactory doctor` says what is missing and how to add it, also where nothing is installed at all."""

import subprocess
import sys
from pathlib import Path

import pytest

from dfactory.commands import doctor
from tests.test_dependencies import declared

ROOT = Path(__file__).resolve().parents[2]
NEEDS = {"": ["torch>=2.13", "numpy"], "rl": ["ray[default]>=2.60", "trl>=1.16"]}


def features(**installed: str) -> list[doctor.Feature]:
    return doctor.of_packages(NEEDS, lambda name: installed.get(name, "unknown"))


def test_all_is_there():
    core, extra = features(torch="2.13.0+cpu", numpy="2.4", ray="2.61.0", trl="1.16.0")
    assert (core.lacks, extra.lacks) == ("", "")
    assert doctor.told(core) == ""


def test_what_is_missing_and_what_is_too_old():
    core, extra = features(torch="2.12.1", numpy="2.4", trl="1.16.0")
    assert core.lacks == "torch>=2.13 (installed is 2.12.1)"
    assert extra.lacks == "ray>=2.60"
    assert doctor.told(extra).splitlines()[1:] == [
        "       lacks: ray>=2.60",
        "       fix:   pip install 'dfactory[rl]'",
    ]


def test_every_extra_says_what_it_is_for():
    assert set(doctor.EXTRAS) == set(declared()) - {""}


def test_memory_is_what_the_control_group_allows(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "CONTROL_GROUP", tmp_path / "memory.max")
    whole = doctor.memory()
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor.memory() == whole
    (tmp_path / "memory.max").write_text(f"{2**28}\n")
    assert doctor.memory() == 2**28


def test_requirements_of_this_environment():
    found = doctor.requirements()
    assert any(line.startswith("torch") for line in found[""])
    assert any(line.startswith("ray") for line in found["rl"])
    assert doctor.lacking(found[""], doctor.version_of) == ""


@pytest.mark.parametrize("secret", ["hf_0123456789abcdef"])
def test_without_any_package(tmp_path, secret):
    """Python without its site-packages: torch, rich and the rest are missing. No secret is printed."""
    code = (
        tmp_path / "code"
    )  # the package alone: beside a checkout's there may lie an .egg-info, which counts as installed
    code.mkdir()
    (code / "dfactory").symlink_to(ROOT / "dfactory")
    words = [sys.executable, "-S", "-m", "dfactory.cli", "doctor"]
    environment = {"PYTHONPATH": str(code), "PATH": "/usr/bin:/bin", "HF_TOKEN": secret}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert "lacks: dfactory is not installed here" in done.stdout
    assert "torch does not import" in done.stdout
    assert "a token is set" in done.stdout
    assert secret not in done.stdout
