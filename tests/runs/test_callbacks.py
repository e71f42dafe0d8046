"""How a recipe names callbacks, and what is said of one that is not right. tests/engine/test_course.py calls the hooks."""

import pytest
import yaml

from dfactory.errors import ConfigError
from dfactory.recipe import load_recipe
from dfactory.runs.callbacks import load_callbacks

CODE = """
from dfactory.runs.callbacks import Callback


class Mine(Callback):
    def __init__(self, recipe, loud=False):
        self.seed, self.loud = recipe.seed, loud


class Hookless:
    def __init__(self, recipe):
        pass


number = 1
"""


@pytest.fixture
def recipe_with(tmp_path, recipe_file):
    (tmp_path / "mine.py").write_text(CODE)

    def load(*callbacks):
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(yaml.safe_load(recipe_file.read_text()) | {"callbacks": list(callbacks)}))
        return load_recipe(file, ["seed=7"])

    return load


def test_a_file_beside_the_recipe_with_options(recipe_with):
    quiet, loud = load_callbacks(recipe_with("mine.py:Mine", {"name": "mine.py:Mine", "loud": True}))
    assert (quiet.seed, quiet.loud, loud.loud) == (7, False, True)
    quiet.on_step(1, {})  # the hooks of Callback do nothing
    quiet.on_evaluate(1, {})
    quiet.on_save(1, None)


@pytest.mark.parametrize(
    "entry, told",
    [
        ("mine.py:Other", "has no attribute 'Other'"),
        ("gone.py:Mine", "No such file"),
        ("no_such_package.Mine", "No module named"),
        ("mine.py:number", "is a int: name a class"),
        ("mine.py:Hookless", "has no on_step, on_evaluate, on_save: inherit"),
        ({"loud": True}, "name None is not text"),
    ],
)
def test_what_is_not_right_is_said(recipe_with, entry, told):
    with pytest.raises(ConfigError, match=told):
        load_callbacks(recipe_with(entry))
