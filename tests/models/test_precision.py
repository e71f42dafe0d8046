"""Which precision multiplies faster here, by measurement."""

import pytest
import torch

from dfactory.models import precision
from dfactory.models.precision import bfloat16_speed, choice, faster_precision, slow_on


def test_a_gpu_needs_no_measurement():
    assert faster_precision("cuda:1").dtype == "bfloat16"
    assert slow_on("cuda:1") is None


def test_a_gpu_that_emulates_bfloat16_computes_in_float32(monkeypatch):
    """As torch tells of GPUs before Ampere; none is here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100-SXM2-32GB")
    faster_precision.cache_clear()
    assert faster_precision("cuda:0") == ("float32", "Tesla V100-SXM2-32GB emulates bfloat16")
    assert slow_on("cuda:0") == "Tesla V100-SXM2-32GB emulates bfloat16"
    faster_precision.cache_clear()


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
