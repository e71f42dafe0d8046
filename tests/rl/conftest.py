"""In a test run of several processes all of tests/rl belongs to one of them: the sandbox's tests look at every sandboxed
process of the machine, and a Ray cluster wants the cores."""

from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("rl"))
