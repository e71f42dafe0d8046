"""`python -m data_tools.preferences`: the same as `dfactory data preferences`."""

import sys

from dfactory.data_tools.command import run
from dfactory.data_tools.preferences import main

if __name__ == "__main__":
    sys.exit(run(main, "preferences"))
