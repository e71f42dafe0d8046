"""`python -m data_tools.stats`: the same as `dfactory data stats`."""

import sys

from dfactory.data_tools.command import run
from dfactory.data_tools.stats import main

if __name__ == "__main__":
    sys.exit(run(main, "stats"))
