"""`python -m data_tools.mix`: the same as `dfactory data mix`."""

import sys

from dfactory.data_tools.command import run
from dfactory.data_tools.mix import main

if __name__ == "__main__":
    sys.exit(run(main, "mix"))
