"""The tiny recipe and the processes of the engine's tests."""

from tests.engine.conftest import dpo_keys, recipe_file, run_jobs  # noqa: F401
