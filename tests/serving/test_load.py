"""The load of tests/serving/load.py, smaller: outcomes of a storm with a signal in it, and memory that stays."""

import asyncio

import pytest

from tests.serving.conftest import serving
from tests.serving.load import WORDS, long_run, storm


@pytest.mark.slow
def test_every_request_of_a_storm_has_one_outcome(tmp_path):
    with serving(tmp_path, *WORDS, batch_size=4) as server:
        result = asyncio.run(storm(server, requests=120, cancels=12, slow_ones=6))
    assert result.problem is None, result
    assert result.outcomes.total() == 120
    assert result.outcomes["200"] >= 32
    assert result.outcomes["429"] > 0
    assert set(result.outcomes) <= {"200", "429", "503", "hung up", "not connected"}, result
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
def test_memory_stays(tmp_path):
    with serving(tmp_path, *WORDS, batch_size=4) as server:
        memory, outcomes = asyncio.run(long_run(server, 250))
    assert memory.problem is None, memory
    assert outcomes["200"] + outcomes["hung up"] == 200
    assert outcomes["400"] == 50
