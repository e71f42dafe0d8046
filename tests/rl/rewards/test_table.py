"""The table of rewards: what its files declare, and that an installed package adds one without a fork."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dfactory.errors import ConfigError
from dfactory.rl.rewards.base import REWARDS

ROOT = Path(__file__).parents[3]
MANNERS = """
from dfactory.rl.rewards.base import REWARDS, Reward
from dfactory.rl.rewards.text import completion_text

def politeness(prompts, completions, *, word="please", **columns):
    return [float(word in completion_text(completion)) for completion in completions]

POLITENESS = REWARDS.add(Reward(politeness))
"""
USE = """
from dfactory.errors import ConfigError
from dfactory.rl.rewards.pool import RewardGroup, RewardPool
from dfactory.rl.rewards.specs import parse_rewards

with RewardPool(parse_rewards(["exact_match", {"name": "politeness", "weight": 0.5, "word": "thanks"}]), workers=1) as pool:
    print(pool.score([RewardGroup("p", ["4", "thanks"], {"answer": "4"}, {})])[0].reward_G)
for entry in ("nonsense", "polite", {"name": "politeness", "wrod": "x"}):
    try:
        RewardPool(parse_rewards([entry]), workers=1)
    except ConfigError as problem:
        print(problem)
"""


def test_what_the_files_declare():
    assert REWARDS.names == (
        *("code_tests", "exact_match", "format_regex", "length_shaping", "math_verify", "reasoning_gym"),
        "tokens_per_forward",
    )
    assert [reward.name for reward in REWARDS if reward.runs_code] == ["code_tests"]
    calls = [reward.name for reward in REWARDS if reward.per_rollout]
    assert calls == ["code_tests", "format_regex", "math_verify", "reasoning_gym"]


def test_the_table_is_read_without_what_rewards_require():
    """A recipe is checked where the extra is not installed, and reward processes are small."""
    code = "import sys\nfrom dfactory.rl.rewards.base import REWARDS\nassert len(REWARDS.names) == 7\n"
    code += "print(sorted({name for reward in REWARDS for name in reward.requires} & set(sys.modules)))\n"
    code += "print(sorted({'torch', 'ray', 'transformers', 'trl'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "[]\n[]\n"


def run_with_package(folder: Path, entry_point: str) -> subprocess.CompletedProcess:
    """USE in a process that finds an installed package with this entry point."""
    (folder / "manners.py").write_text(MANNERS)
    metadata = folder / "manners-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: manners\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[dfactory.rewards]\npoliteness = {entry_point}\n")
    code = f"import sys\nsys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]\n{USE}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("entry_point", ["manners", "manners:POLITENESS"])
def test_an_installed_package_adds_a_reward(tmp_path, entry_point):
    done = run_with_package(tmp_path, entry_point)
    assert done.returncode == 0, done.stderr
    scores, unknown, near, option = done.stdout.splitlines()
    assert scores == "[1.0, 0.5]"
    builtin = "code_tests, exact_match, format_regex, length_shaping, math_verify, reasoning_gym, tokens_per_forward"
    assert unknown == f"reward nonsense is not known: builtin are {builtin}; installed packages add politeness"
    assert near == "reward polite is not known: did you mean politeness?"
    assert option == "reward politeness has no option wrod: did you mean word?"


def test_an_entry_point_that_names_a_bare_function_is_refused(tmp_path):
    done = run_with_package(tmp_path, "manners:politeness")
    assert "ConfigError: reward politeness (manners:politeness) has no name: let the entry point name" in done.stderr


def test_a_table_that_cannot_be_read_says_so_every_time(tmp_path, monkeypatch):
    """A file that fails leaves no half table."""
    entry = "from manners_twice import TABLE\n\nclass Polite:\n    name = 'politeness'\n\nTABLE.add(Polite)\n"
    table = "from dfactory.seams import Table\n\nTABLE = Table('reward', 'manners_twice', 'manners.none')\n"
    (tmp_path / "manners_twice").mkdir()
    for name, text in {"__init__": table, "one": entry, "two": entry}.items():
        (tmp_path / "manners_twice" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    twice = importlib.import_module("manners_twice").TABLE
    problem = "reward politeness is declared twice, by manners_twice.one and manners_twice.two"
    for _ in range(2):
        with pytest.raises(ConfigError, match=re.escape(problem)):
            "politeness" in twice  # noqa: B015
