"""`dfactory export --push-to-hub`: an exported directory becomes a repository on the hub, card and lineage included.

The token is the one that huggingface_hub finds: HF_TOKEN, or the file that `hf auth login` writes. It is checked before the
export begins. What is written of it anywhere is redacted.
"""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError

from dfactory.errors import ConfigError
from dfactory.hub import is_repository, unwritten
from dfactory.redaction import remember

MESSAGE = "Upload by dFactory"


class Push:
    """One repository that a directory will be uploaded to. Raises ConfigError for a name that is none, and where the hub
    does not know who asks."""

    def __init__(self, name: str, private: bool = False):
        if not is_repository(name):
            raise ConfigError(f"--push-to-hub {name}: give the name of a repository, org/name")
        token = get_token()
        if not token:
            raise ConfigError(f"--push-to-hub {name}: there is no token; give one that may write, in HF_TOKEN")
        remember({"hf_token": token})
        self.name, self.private, self._api = name, private, HfApi(token=token)
        self._asked(self._api.whoami)

    def upload(self, folder: Path) -> str:
        """Upload a directory in one commit; the repository is made where there is none. Returns the commit's address. Raises
        ConfigError, which names the command that uploads the directory later."""
        then = f"; {folder} is complete: `hf upload {self.name} {folder}` uploads it"
        self._asked(lambda: self._api.create_repo(self.name, private=self.private or None, exist_ok=True), then)
        return self._asked(
            lambda: self._api.upload_folder(repo_id=self.name, folder_path=folder, commit_message=MESSAGE), then
        ).commit_url

    def _asked(self, ask, then: str = ""):
        try:
            return ask()
        except (OSError, RuntimeError, ValueError, HFValidationError) as problem:  # what huggingface_hub raises
            raise unwritten(problem, f"--push-to-hub {self.name}", then) from problem
