"""`python -m data_tools.decontaminate`: the same as `dfactory data decontaminate`."""

import sys

from dfactory.data_tools.command import run
from dfactory.data_tools.decontaminate import main

if __name__ == "__main__":
    sys.exit(run(main, "decontaminate"))
