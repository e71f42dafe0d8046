"""The failures that dFactory expects, each with a kind and an exit status.

Every message names what was wrong (a key, or file:line), the value, the rule it broke, and what to do about it.
Anything that is not one of these is a bug and rises with its traceback.
"""

from dfactory.redaction import redact


class DFactoryError(Exception):
    """Base of the expected failures. The command line prints the message without a traceback."""

    exit_status = 1

    def __str__(self) -> str:
        return redact(super().__str__())  # here, because Ray's native code logs the exceptions of actors


class ConfigError(DFactoryError):
    """A recipe, key or option is wrong; nothing was started. Exit status 2."""

    exit_status = 2


class DataError(DFactoryError):
    """A record, file or template cannot be used; the message names file:line where there is one."""


class CheckpointError(DFactoryError):
    """A model directory or a training checkpoint is missing, incomplete or does not fit the run."""


class NonFiniteError(DFactoryError):
    """A loss or gradient is NaN or infinite more often than the recipe tolerates; the message names step and dump."""


class SilentFailureError(DFactoryError):
    """A run would continue without learning anything: no parameter changes, or no target is left to predict."""


class RolloutError(DFactoryError):
    """A rollout, reward or actor failed beyond what the recipe tolerates."""
