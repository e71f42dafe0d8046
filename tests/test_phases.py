"""Seconds of a step by phase."""

import time

import pytest
import torch

from dfactory.phases import Phases


def test_a_phase_within_another_takes_its_time_away():
    phases, started = Phases(torch.device("cpu")), time.perf_counter()
    time.sleep(0.01)  # in no phase
    with phases("evaluation"):
        with phases("forward"):
            time.sleep(0.02)
        with phases("forward"):
            time.sleep(0.01)
    found, whole = phases.taken(), time.perf_counter() - started
    assert found.keys() == {"seconds/evaluation", "seconds/forward"}
    assert found["seconds/forward"] >= 0.03
    assert sum(found.values()) <= whole - 0.01
    assert phases.taken() == {}


def test_a_phase_that_fails_ends():
    phases = Phases(torch.device("cpu"))
    with pytest.raises(KeyError), phases("backward"):
        raise KeyError
    first = phases.taken()["seconds/backward"]
    assert first >= 0
    assert phases.taken() == {}


def test_a_phase_over_the_end_of_a_step_counts_in_both():
    phases = Phases(torch.device("cpu"))
    with phases("save"):
        assert phases.taken()["seconds/save"] >= 0
    assert phases.taken()["seconds/save"] >= 0
