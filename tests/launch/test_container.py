"""The container files name what exists: hadolint checks the Dockerfile in .ci/run, and nothing here builds an image."""

import json
import re
from pathlib import Path

from tests.test_dependencies import declared

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "launch/Dockerfile").read_text()


def test_the_dockerfile_copies_what_a_wheel_is_made_of():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "**"
    shown = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert {"dfactory", "recipes", "launch", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"} <= shown
    assert all((ROOT / name).exists() for name in shown)


def test_the_dockerfile_installs_extras_that_there_are():
    extras = re.search(r"whl\)\[([\w,]+)\]", DOCKERFILE).group(1).split(",")
    assert set(extras) <= set(declared())


def test_the_image_runs_without_root_and_starts_the_doctor():
    instructions = [line for line in DOCKERFILE.splitlines() if line.startswith(("USER", "ENTRYPOINT", "CMD"))]
    assert instructions == ["USER 1000", 'ENTRYPOINT ["dfactory"]', 'CMD ["doctor"]']


def test_the_devcontainer_is_json_and_calls_a_script_that_there_is():
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    (script,) = re.findall(r"bash (\S+)", container["postCreateCommand"])
    assert (ROOT / script).is_file()
    assert container["remoteEnv"]["PATH"].startswith("${containerWorkspaceFolder}/.venv/bin")
