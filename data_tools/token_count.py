"""`python -m data_tools.token_count`: the same as `dfactory data token-count`."""

import sys

from dfactory.data_tools.command import run
from dfactory.data_tools.token_count import main

if __name__ == "__main__":
    sys.exit(run(main, "token-count"))
