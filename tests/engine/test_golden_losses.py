"""The losses of every objective are, to the digit, those of the golden files; tests/golden/README.md says how to renew."""

import json

import pytest

from tests.golden.losses import FOLDER, OBJECTIVES, STEPS, measure

TOLERANCE = {"loss": 1e-5, "grad_norm": 1e-4}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_are_the_golden_ones(objective, tmp_path):
    golden = json.loads((FOLDER / f"{objective}.json").read_text())
    measured = measure(objective, tmp_path)
    assert golden.keys() == measured.keys() == TOLERANCE.keys()
    for name, values in measured.items():
        assert len(golden[name]) == STEPS
        assert values == pytest.approx(golden[name], rel=TOLERANCE[name], abs=1e-8), name
