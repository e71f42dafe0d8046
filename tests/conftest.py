"""Which tests share a process when several run at once: those of a file, and all that look for each other's processes."""

from pathlib import Path

import pytest

SANDBOX = (Path(__file__).parent / "rl/test_sandbox.py", Path(__file__).parent / "rl/test_reward_pool.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        sandboxed = item.path in SANDBOX or item.path.is_relative_to(Path(__file__).parent / "rl/rewards")
        item.add_marker(pytest.mark.xdist_group("sandbox" if sandboxed else str(item.path)))
