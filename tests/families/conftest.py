"""The fixture that trains on several processes is that of the engine's tests, that of random models those of the models'."""

from tests.engine.conftest import run_jobs  # noqa: F401
from tests.models.conftest import random_policy  # noqa: F401
