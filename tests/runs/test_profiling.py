"""`profile_steps` and `device_tflops` in a run: what is written, and when not."""

import gzip
import json

import pytest

from dfactory.errors import ConfigError
from dfactory.recipe import load_recipe
from tests.runs.test_sanity import _train


def test_some_steps_are_recorded_and_the_share_of_the_peak_is_told(recipe_file, tmp_path):
    """Step 2 of 2. The golden model takes about 1e-4 TFLOP a step."""
    rows = _train(recipe_file, tmp_path, "profile_steps=[2,2]", "device_tflops=0.1")
    steps = [row for row in rows if "loss" in row]
    assert [row["tokens_per_second_per_device"] for row in steps] == [row["tokens_per_second"] for row in steps]
    assert all(0 < row["mfu"] < 1 for row in steps)
    spent = ["batch", "forward", "backward", "optimizer"]
    assert all(0 < sum(row[f"seconds/{phase}"] for phase in spent[1:]) <= row["seconds"] for row in steps)
    assert all(row["seconds/batch"] > 0 for row in steps)
    folder = tmp_path / "profile"
    assert sorted(file.name for file in folder.iterdir()) == ["operators.txt", "trace.json.gz"]
    assert "aten::mm" in (folder / "operators.txt").read_text()
    with gzip.open(folder / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert any(event.get("name") == "aten::scaled_dot_product_attention" for event in events)


@pytest.mark.parametrize("steps", ["[0,2]", "[3,2]", "[1]"])
def test_steps_that_are_no_range_are_refused(recipe_file, steps):
    with pytest.raises(ConfigError, match=r"profile_steps \[.*name the first and the last step, such as \[10, 12\]"):
        load_recipe(recipe_file, [f"profile_steps={steps}"])
