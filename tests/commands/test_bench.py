"""`dfactory bench`: names, words, and what is said where there is no checkout."""

import pytest

from benchmarks import BENCHMARKS
from dfactory.cli import main
from dfactory.commands.bench import bench
from dfactory.errors import ConfigError
from tests.commands.conftest import ROOT


def test_words_and_the_exit_status_are_the_benchmarks_own(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # from anywhere, as the installed command
    assert main(["bench", "scale", "--help"]) == 0
    assert "usage: dfactory bench scale" in capfd.readouterr().out
    assert main(["bench", "scale", "--no-such-word"]) == 2


def test_an_unknown_name_is_answered_with_the_list(capfd):
    assert main(["bench", "setp", "--profile"]) == 2
    told = capfd.readouterr().err
    assert "setp is not a benchmark" in told
    assert all(name in told for name in BENCHMARKS)


def test_without_a_checkout_it_says_where_benchmarks_lie(tmp_path):
    with pytest.raises(ConfigError, match=r"not installed with it.*in the root of a checkout"):
        bench("step", [], root=tmp_path)


def test_every_program_has_a_name_and_a_line_in_the_readme():
    programs = {file.stem for file in (ROOT / "benchmarks").glob("*.py") if "\ndef main(" in file.read_text()}
    assert programs == set(BENCHMARKS)
    readme = (ROOT / "benchmarks/README.md").read_text()
    missing = [name for name in BENCHMARKS if f"| `dfactory bench {name}" not in readme]
    assert not missing
