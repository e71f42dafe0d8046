"""One shuffled file of several, each with a weight.

    dfactory data mix a.jsonl=1 b.jsonl=0.3 c.jsonl=2.5 --output mixed.jsonl

A weight says how often each record of a file is written, as `datasets.weight` says how often an epoch sees it: 0.3 draws
three records in ten, 2.5 writes each twice and every second one once more. Order and draw are a function of the seed. A
file without a weight has weight 1. Lines of .jsonl stay as they are; .json, .parquet, .arrow and .csv are read as tables
(.jsonl.gz is not read: its lines cannot be found again). Memory: about 100 bytes a row.
"""

import numpy as np

from dfactory.data.entries import entry_of, paths_of
from dfactory.data.fields import BadRow, Fault, show
from dfactory.data.order import EpochOrder
from dfactory.data.progress import reading
from dfactory.data.streaming import BLANK, numbered
from dfactory.data_tools.command import named_numbers, parser_of, say
from dfactory.data_tools.files import writing
from dfactory.errors import ConfigError, DataError


def main(words: list[str] | None = None) -> int:
    parser = parser_of("mix")
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE[=WEIGHT]",
        help=".jsonl, .json, .parquet, .arrow or .csv, with weights",
    )
    parser.add_argument("--output", required=True, help=".jsonl, .jsonl.gz or .parquet")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(words)
    named = [word if "=" in word else f"{word}=1" for word in options.files]
    weights = named_numbers(named, "files as FILE.jsonl=WEIGHT")
    if len(weights) < len(named):
        raise ConfigError(
            f"a file is named twice in {' '.join(options.files)}: give it once, with the sum of the weights"
        )

    with reading(paths_of(weights), "looking for lines") as advance:
        files = [numbered(entry_of(word), advance) for word in weights]
    first_F1 = np.cumsum([0, *map(len, files)])
    weight_U = np.repeat(list(weights.values()), np.diff(first_F1))
    counts = dict.fromkeys(weights, 0)
    with writing(options.output) as write:
        for unit in EpochOrder(weight_U, options.seed).visits(0)[0].tolist():
            file_index = int(np.searchsorted(first_F1, unit, "right")) - 1
            file, index = files[file_index], unit - int(first_F1[file_index])
            row = file.row(index)
            if row is BLANK:
                continue
            if not isinstance(row, (dict, BadRow)):
                row = BadRow(Fault.JSON, f"the row is {show(row)}: it must be a JSON object")
            if isinstance(row, BadRow):
                raise DataError(
                    f"{file.name}:{index + 1}: {row}; `dfactory data validate` tells all such lines"
                ) from row
            counts[file.name] += 1
            write(row)
    shown = ", ".join(f"{count:,} of {path}" for path, count in counts.items())
    say(f"{sum(counts.values()):,} rows ({shown}): {options.output}")
    return 0
