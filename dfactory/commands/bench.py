"""`dfactory bench NAME ...`: run one of the programs of benchmarks/, which lies beside the package in a checkout."""

import importlib
import sys
from pathlib import Path

from dfactory.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def bench(name: str, words: list[str], root: Path = ROOT) -> int:
    """The benchmark's own exit status. Raises ConfigError for a name that is none, or where there is no benchmarks/."""
    if not (root / "benchmarks" / "__init__.py").is_file():
        raise ConfigError(
            f"benchmarks/ is part of a checkout of dFactory and is not installed with it, and {root} has none: "
            "call `python -m dfactory.cli bench` in the root of a checkout"
        )
    if sys.path[0] != str(root):  # the installed command starts with the folder of programs there
        sys.path.insert(0, str(root))
    from benchmarks import BENCHMARKS

    if name not in BENCHMARKS:
        raise ConfigError(f"{name} is not a benchmark: use one of {', '.join(BENCHMARKS)}")
    return importlib.import_module(f"benchmarks.{name}").main(words)
