"""`python -m data_tools.rollouts`: the same as `dfactory data rollouts`."""

import sys

from dfactory.data_tools.command import run
from dfactory.data_tools.rollouts import main

if __name__ == "__main__":
    sys.exit(run(main, "rollouts"))
