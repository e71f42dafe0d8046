"""Print what each stage of the quickstart changed, beside what is expected.

    python -m data_tools.quickstart_table RUN...

`dfactory quickstart` prints the same table at its end; dfactory/commands/quickstart_table.py says where its numbers come
from. `--write` makes recipes/quickstart/expected.json.
"""

import argparse
import json
import sys
from pathlib import Path

from dfactory.commands.quickstart_table import numbers, read_expected, stage_of, table
from dfactory.commands.recipes import recipes_folder
from dfactory.console import plain_console
from dfactory.errors import DataError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, a stage each")
    parser.add_argument("--write", type=Path, help="write the numbers as JSON too, as expected.json has them")
    options = parser.parse_args(arguments)
    try:
        found = {stage_of(run): {name: round(value, 4) for name, value in numbers(run).items()} for run in options.runs}
        shown = table(options.runs, read_expected(recipes_folder()))
    except DataError as problem:
        raise SystemExit(str(problem)) from problem
    if options.write:
        options.write.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    plain_console().print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
