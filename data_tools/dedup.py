"""`python -m data_tools.dedup`: the same as `dfactory data dedup`."""

import sys

from dfactory.data_tools.command import run
from dfactory.data_tools.dedup import main

if __name__ == "__main__":
    sys.exit(run(main, "dedup"))
