"""`python -m data_tools.convert`: the same as `dfactory data convert`."""

import sys

from dfactory.data_tools.command import run
from dfactory.data_tools.convert import main

if __name__ == "__main__":
    sys.exit(run(main, "convert"))
