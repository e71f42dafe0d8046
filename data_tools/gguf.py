"""`python -m data_tools.gguf`: the same as `dfactory data gguf`."""

import sys

from dfactory.data_tools.command import run
from dfactory.data_tools.gguf import main

if __name__ == "__main__":
    sys.exit(run(main, "gguf"))
