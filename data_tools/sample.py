"""`python -m data_tools.sample`: the same as `dfactory data sample`."""

import sys

from dfactory.data_tools.command import run
from dfactory.data_tools.sample import main

if __name__ == "__main__":
    sys.exit(run(main, "sample"))
