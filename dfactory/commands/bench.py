"""`dfactory bench NAME ...`: run one of the programs of benchmarks/, which is next to the package in a checkout."""

import os
import subprocess
import sys
from pathlib import Path

from dfactory.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def bench(name: str, words: list[str], root: Path = ROOT) -> int:
    """The benchmark's own exit status. Raises ConfigError where there is no benchmarks/.

    A process of its own finds benchmarks/ and tests/ on its path; nothing of dfactory imports them.
    """
    if not (root / "benchmarks" / "__init__.py").is_file():
        raise ConfigError(
            f"benchmarks/ is part of a checkout of dFactory and is not installed with it, and {root} has none: "
            "call `python -m dfactory.cli bench` in the root of a checkout"
        )
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "benchmarks", name, *words]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=False).returncode
