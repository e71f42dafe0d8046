"""The fixture that trains on several processes is that of the engine's tests."""

from tests.engine.conftest import run_jobs  # noqa: F401
