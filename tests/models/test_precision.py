"""Which precision multiplies faster here, by measurement."""

import pytest

from dfactory.models import precision
from dfactory.models.precision import bfloat16_speed, choice, faster_precision


def test_a_gpu_needs_no_measurement():
    assert faster_precision("cuda:1").dtype == "bfloat16"


@pytest.mark.parametrize("speed, dtype", [(0.5, "float32"), (1.1, "float32"), (1.2, "bfloat16"), (2.5, "bfloat16")])
def test_bfloat16_has_to_be_clearly_faster(speed, dtype):
    assert choice(speed).dtype == dtype
    assert f"{speed:.2f} times as fast" in choice(speed).reason


def test_a_process_measures_once(monkeypatch):
    """And both precisions, whose ratio is that of its seconds."""
    faster_precision.cache_clear()
    assert faster_precision("cpu") is faster_precision("cpu")
    spent = {"torch.float32": 3.0, "torch.bfloat16": 2.0}
    monkeypatch.setattr(precision, "_seconds", lambda rows, weight: spent[str(weight.dtype)])
    assert bfloat16_speed.__wrapped__() == 1.5
