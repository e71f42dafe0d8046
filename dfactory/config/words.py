"""Words of the command line: `--a.b v`, `--a.b=v` and `a.b=v` say the same. No imports that --help would wait for."""

import difflib
from collections.abc import Collection

RECORD_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".arrow", ".csv")
RECORD_FILES = ".jsonl, .jsonl.gz, .json, .parquet, .arrow or .csv"
RECORDS_HELP = f"{RECORD_FILES}, or a dataset on the hub (org/name, org/name@revision[split])"
TEMPLATE_ENDINGS = (".jinja", ".jinja2", ".j2", ".txt")
TEMPLATE_HELP = (
    "chat template instead of the tokenizer's own: a Jinja file, a name such as chatml, or a model that has it"
)
MODEL_HELP = "model directory, run folder, name on the hub (org/name or org/name@revision), or `tiny`"


def join_options(words: list[str], own: Collection[str]) -> list[str]:
    """Turn options that the command itself does not have (`own` names those that it has) into key=value words.

    An option that is nearly one of the command's, or has no value, stays as it is: argparse then says that it is unknown.
    """
    joined, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if not word.startswith("--") or name in own or difflib.get_close_matches(name, own, n=1, cutoff=0.8):
            joined.append(word)
            continue
        if not equals and (not rest or rest[0].startswith("--")):
            joined.append(word)
            continue
        joined.append(f"{name.removeprefix('--').replace('-', '_')}={value if equals else rest.pop(0)}")
    return joined
