"""Divide a file into parts that share no prompt.

    dfactory data split FILE ... --output FOLDER heldout=0.05 train=0.95

A record's part is a function of its normalised prompt and the seed, so that the same question is never in two parts, however
it is written and wherever it stands, nor in those of another file that was split with the same seed and parts. The shares
are therefore met only about. Parts are written as FOLDER/NAME.jsonl (see --format). Memory does not grow with the file.
"""

import contextlib
import hashlib
from collections import Counter

from dfactory.config.words import RECORD_ENDINGS, RECORDS_HELP
from dfactory.data.entries import entry_of, paths_of
from dfactory.data.progress import reading
from dfactory.data_tools.command import named_numbers, parser_of, say
from dfactory.data_tools.files import ENDINGS, writing
from dfactory.data_tools.identity import prompt_key
from dfactory.data_tools.rows import read_rows
from dfactory.errors import ConfigError


def main(words: list[str] | None = None) -> int:
    parser = parser_of("split")
    parser.add_argument("words", nargs="+", metavar="FILE | NAME=SHARE", help="files, and the parts with their shares")
    parser.add_argument("--output", required=True, help="folder for the parts")
    parser.add_argument("--format", choices=ENDINGS, default=".jsonl", help="of the parts (default: .jsonl)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", action="store_true", help="read rows as preference pairs where they can be both")
    options = parser.parse_args(words)
    files = [word for word in options.words if word.endswith(RECORD_ENDINGS) or entry_of(word).name]
    shares = named_numbers([word for word in options.words if word not in files], "parts as NAME=SHARE")
    if not files:
        raise ConfigError(f"no file to split: name one that ends in {RECORDS_HELP}")
    if len(shares) < 2 or not sum(shares.values()):
        raise ConfigError("give two parts or more with their shares, such as train=0.95 heldout=0.05")

    if paths := [name for name in shares if "/" in name]:
        raise ConfigError(
            f"part {paths[0]} would lie outside of {options.output}: a part's name is that of a file in it"
        )

    counts: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(reading(paths_of(files), "splitting"))
        writers = {name: stack.enter_context(writing(f"{options.output}/{name}{options.format}")) for name in shares}
        for path in files:
            for row in read_rows(path, options.pairs, advance):
                part = part_of(prompt_key(row.record), shares, options.seed)
                counts[part] += 1
                writers[part](row.fields)
    for name in shares:
        share = counts[name] / counts.total()
        say(f"{counts[name]:,} rows ({share:.1%}): {options.output}/{name}{options.format}")
    if empty := [name for name in shares if shares[name] and not counts[name]]:
        say(f"warning: nothing fell into {', '.join(empty)}: the file has too few prompts for its share")
    return 0


def part_of(prompt: int, shares: dict[str, float], seed: int) -> str:
    """The part that a prompt belongs to."""
    digest = hashlib.blake2b(f"{seed}/{prompt}".encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64 * sum(shares.values())
    for name, share in shares.items():
        place -= share
        if place < 0:
            return name
    return max(shares, key=shares.get)  # rounding at the upper end
