"""`python -m data_tools.export_parquet`: the same as `dfactory data export-parquet`."""

import sys

from dfactory.data_tools.command import run
from dfactory.data_tools.export_parquet import main

if __name__ == "__main__":
    sys.exit(run(main, "export-parquet"))
