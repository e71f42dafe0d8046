"""The table of what a resumed run does with a changed key: whole, told in recipes/README.md, and right about differences."""

import dataclasses

import pytest

from dfactory.config import resume
from dfactory.config.load import known_keys
from dfactory.errors import ConfigError
from dfactory.recipe import AlgorithmKeys, Recipe
from tests.commands.conftest import ROOT

PARTS = [resume.THIS_START, resume.APPLIED, set(resume.LIMITED), set(resume.KEPT)]


def test_every_key_is_in_one_part_of_the_table():
    keys = {name for name, field in known_keys(Recipe).items() if not dataclasses.is_dataclass(field.type)}
    keys = {"decode.*" if name.startswith("decode.") else name for name in keys}
    listed = [name for part in PARTS for name in part]
    algorithms = {field.name for field in dataclasses.fields(AlgorithmKeys)}
    told = "say in dfactory/config/resume.py what a resumed run does with a new key, then `dfactory schema --resume`"
    assert len(set(listed)) == len(listed)
    assert set(listed) | algorithms == keys, told


def test_the_page_has_the_table():
    told = "`dfactory schema --resume` prints it"
    keys = [field.name for field in dataclasses.fields(AlgorithmKeys)]
    assert resume.resume_table(keys) in (ROOT / "recipes/README.md").read_text(), told


def test_changes_are_those_of_both_recipes():
    before = {"seed": 1, "output_dir": "a", "gone": 1, "decode": {"threshold": 0.5, "steps": None}, "datasets": [1]}
    now = {"seed": 1, "output_dir": "b", "new": 1, "decode": {"threshold": 0.5, "steps": 2}, "datasets": [2]}
    changes = resume.changes_between(before, now)
    assert [str(change) for change in changes] == ["datasets [1] -> [2]", "decode.steps null -> 2"]
    resume.refuse_kept(changes, "checkpoint-1")


@pytest.mark.parametrize("key", resume.KEPT)
def test_keys_that_stay_are_refused_by_name(key):
    changes = resume.changes_between({key: "a"}, {key: "b"})
    with pytest.raises(ConfigError) as problem:
        resume.refuse_kept(changes, "runs/a/checkpoint-1")
    assert f"resuming from runs/a/checkpoint-1 cannot change {key} a -> b: {resume.KEPT[key]}" in str(problem.value)
