"""`python -m data_tools.preview`: the same as `dfactory data preview`."""

import sys

from dfactory.data_tools.command import run
from dfactory.data_tools.preview import main

if __name__ == "__main__":
    sys.exit(run(main, "preview"))
