"""`python -m benchmarks NAME ...`: one of the programs, as `dfactory bench` starts it."""

import importlib
import sys

from benchmarks import BENCHMARKS


def run(words: list[str]) -> int:
    name = words[0] if words else "no name"
    if name not in BENCHMARKS:
        print(f"dfactory bench: {name} is not a benchmark: use one of {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    sys.argv[0] = f"dfactory bench {name}"  # in the usage line
    return importlib.import_module(f"benchmarks.{name}").main(words[1:])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
