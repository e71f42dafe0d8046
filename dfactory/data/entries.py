"""What a command line names as records: a file, or a dataset of the hub with revision, configuration and split.

rows.jsonl                            a file, also where the hub has a dataset of that name
org/set                               the split `train` of its default configuration, newest version
org/set@v1.0[main/test[:200]]         at a revision, of the configuration `main`, the first 200 rows of `test`
"""

import re
from collections.abc import Iterable
from pathlib import Path

from dfactory.config.data import DatasetKeys
from dfactory.config.words import RECORD_ENDINGS
from dfactory.hub import is_hub_name

_OF_THE_HUB = re.compile(
    r"(?P<name>[^@\[\]]+)(?:@(?P<revision>[^\[\]\s]+))?(?:\[(?:(?P<config>[\w.-]+)/)?(?P<split>.+)\])?"
)


def entry_of(word: str | Path | DatasetKeys) -> DatasetKeys:
    """The entry that a word stands for. What can be no name on the hub is a path, which its reader finds or refuses."""
    if isinstance(word, DatasetKeys):
        return word
    text = str(word)
    found = _OF_THE_HUB.fullmatch(text)
    if Path(text).exists() or text.endswith(RECORD_ENDINGS) or not found or not is_hub_name(found["name"]):
        return DatasetKeys(text)
    return DatasetKeys(
        name=found["name"], revision=found["revision"], config=found["config"], split=found["split"] or "train"
    )


def paths_of(words: Iterable[str | Path | DatasetKeys]) -> list[str]:
    """The local files among them, for a progress bar."""
    return [entry.path for entry in map(entry_of, words) if entry.path]
