"""Names on the Hugging Face hub: what a name looks like, and what to do when the hub does not give what it stands for."""

import os
import re
from pathlib import Path

from huggingface_hub import constants, get_token, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dfactory.errors import ConfigError
from dfactory.redaction import remember

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_UNKNOWN = "there is no such repository, or it is private"
_TOKEN = "the hub does not accept the token; give one in HF_TOKEN"


def is_hub_name(text: str) -> bool:
    """Whether a text can be the name of a repository, `org/name`. A file or folder of that name comes first."""
    return bool(_NAME.fullmatch(text)) and not os.path.exists(text)


def is_repository(text: str) -> bool:
    """The same whatever lies on the disk."""
    return bool(_NAME.fullmatch(text))


def fetch(name: str, revision: str | None, file: str, told: str) -> Path | None:
    """A file of a model's repository, in the cache; None where the repository lacks it. Raises ConfigError, which `told`
    begins, where the repository cannot be read."""
    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except EntryNotFoundError as problem:
        if isinstance(problem, LocalEntryNotFoundError):  # the hub was not asked, or did not answer
            raise refusal(problem, told, revision) from problem
        return None
    except (OSError, HFValidationError) as problem:
        raise refusal(problem, told, revision) from problem


def refusal(problem: Exception, told: str, revision: str | None) -> ConfigError:
    """The error to raise for what huggingface_hub or datasets raised. `told` is its beginning: what cannot be read."""
    remember({"hf_token": get_token() or ""})  # it may come from a file: hide it in what is printed from here on
    known = f"{told} from {constants.ENDPOINT}"
    causes = _chain(problem)
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return ConfigError(f"{known}: access has to be granted on its page first; then give your token in HF_TOKEN")
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return ConfigError(f"{known}: it has no revision {revision}; correct the revision")
    if any(isinstance(cause, RepositoryNotFoundError | HFValidationError) for cause in causes):
        return missing(told, _UNKNOWN)
    if any(_status(cause) in (401, 403) for cause in causes):
        return ConfigError(f"{known}: {_TOKEN}") if get_token() else missing(told, _UNKNOWN)
    if constants.HF_HUB_OFFLINE or any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return ConfigError(
            f"{known}: HF_HUB_OFFLINE is set, and the cache {constants.HF_HOME} does not hold it; unset HF_HUB_OFFLINE "
            "to download it, set HF_HOME to a cache that holds it, or give a local path instead"
        )
    if any(isinstance(cause, EntryNotFoundError | OSError) for cause in causes):
        return ConfigError(
            f"{known}: the server does not answer ({_first_line(causes[-1])}), and the cache {constants.HF_HOME} does "
            "not hold it; connect to the network, set HF_ENDPOINT to a mirror, or give a local path instead"
        )
    return ConfigError(f"{known}: {_first_line(problem)}")


def unwritten(problem: Exception, told: str, then: str) -> ConfigError:
    """The error to raise where nothing could be written to the hub. `told` is what was to be written, `then` how to go
    on."""
    known, causes = f"{told} at {constants.ENDPOINT}", _chain(problem)
    if any(_status(cause) in (401, 403) for cause in causes):
        return ConfigError(f"{known}: {_TOKEN}, with the right to write there{then}")
    if constants.HF_HUB_OFFLINE:
        return ConfigError(f"{known}: HF_HUB_OFFLINE is set; unset it{then}")
    return ConfigError(f"{known}: {_first_line(causes[-1])}{then}")


def missing(told: str, reason: str) -> ConfigError:
    """The error to raise for what the hub does not have. `told` is as in `refusal`."""
    remedy = "correct the name, or give your token in HF_TOKEN"
    return ConfigError(f"{told} from {constants.ENDPOINT}: {reason}; {remedy}")


def _status(problem: BaseException) -> int | None:
    """Of the hub's answer; None where it did not answer."""
    return getattr(getattr(problem, "response", None), "status_code", None)


def _chain(problem: BaseException) -> list[BaseException]:
    """The exception and those that it was raised from."""
    found = []
    while problem is not None and problem not in found:
        found.append(problem)
        problem = problem.__cause__ or problem.__context__
    return found


def _first_line(problem: BaseException) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return f"{type(problem).__name__}: {lines[0][:200]}" if lines else type(problem).__name__
