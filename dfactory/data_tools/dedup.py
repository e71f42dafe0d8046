"""Leave out records that are there already.

    dfactory data dedup FILE ... --output NEW.jsonl [--by prompt]

Compared is the normalised text (NFKC, case folded, white space as single spaces) of prompt and response, or of the prompt
alone; the first of equals stays as it is. Rows that cannot be read end the command with their file:line.
Memory: about 100 bytes a kept row.
"""

from dfactory.config.words import RECORDS_HELP
from dfactory.data.entries import paths_of
from dfactory.data.progress import reading
from dfactory.data_tools.command import parser_of, say
from dfactory.data_tools.files import writing
from dfactory.data_tools.identity import prompt_key, record_key
from dfactory.data_tools.rows import read_rows

KEYS = {"record": record_key, "prompt": prompt_key}
SHOWN = 5  # duplicates that are printed


def main(words: list[str] | None = None) -> int:
    parser = parser_of("dedup")
    parser.add_argument("files", nargs="+", help=RECORDS_HELP)
    parser.add_argument("--output", required=True, help=".jsonl, .jsonl.gz or .parquet")
    parser.add_argument(
        "--by", choices=tuple(KEYS), default="record", help="prompt and response, or the prompt alone (default: record)"
    )
    parser.add_argument("--pairs", action="store_true", help="read rows as preference pairs where they can be both")
    options = parser.parse_args(words)

    seen: set[int] = set()
    count = 0
    with reading(paths_of(options.files), "comparing") as advance, writing(options.output) as write:
        for path in options.files:
            for row in read_rows(path, options.pairs, advance):
                count += 1
                key = KEYS[options.by](row.record)
                if key not in seen:
                    seen.add(key)
                    write(row.fields)
                elif count - len(seen) <= SHOWN:
                    say(f"{row.origin} is there already")
    say(f"{len(seen):,} of {count:,} rows kept, {count - len(seen):,} duplicates by {options.by}: {options.output}")
    return 0
