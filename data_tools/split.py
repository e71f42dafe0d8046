"""`python -m data_tools.split`: the same as `dfactory data split`."""

import sys

from dfactory.data_tools.command import run
from dfactory.data_tools.split import main

if __name__ == "__main__":
    sys.exit(run(main, "split"))
