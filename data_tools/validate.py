"""`python -m data_tools.validate`: the same as `dfactory data validate`."""

import sys

from dfactory.data_tools.command import run
from dfactory.data_tools.validate import main

if __name__ == "__main__":
    sys.exit(run(main, "validate"))
