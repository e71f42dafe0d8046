"""`python -m data_tools.distil`: the same as `dfactory data distil`."""

import sys

from dfactory.data_tools.command import run
from dfactory.data_tools.distil import main

if __name__ == "__main__":
    sys.exit(run(main, "distil"))
