"""Runs of n words that texts share with evaluation records.

A text's words are its letters and digits in Unicode form NFKC, case folded, without punctuation; of Chinese and Japanese
every character is a word. A training text is compared with an evaluation text by the share of the latter's distinct runs
that it holds. A question of fewer than n words has no run: it is compared as a whole. An answer that short is not
compared: half of all records say "yes".
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(f"[{IDEOGRAPHS}]|[^\\W_{IDEOGRAPHS}]+")


class Overlap(NamedTuple):
    origin: str  # of the evaluation record
    share: float  # of its runs


class Ngrams:
    """The runs of evaluation texts, each with the records that hold it."""

    def __init__(self, n: int):
        self.n = n
        self.origins: list[str] = []
        self.whole = 0  # questions that are compared as a whole
        self.left_out = 0  # answers that are not compared
        self._records: dict[str, list[int]] = {}
        self._sizes: list[int] = []
        self._whole: dict[str, int] = {}

    def add(self, origin: str, text: str, is_answer: bool = False) -> None:
        """One text of an evaluation record; one without a word says nothing."""
        words, number = words_of(text), len(self.origins)
        if is_answer and 0 < len(words) < self.n:
            self.left_out += 1
        if not words or (is_answer and len(words) < self.n):
            return
        self.origins.append(origin)
        if len(words) < self.n:
            self.whole += 1
            self._sizes.append(1)
            self._whole.setdefault(" ".join(words), number)
            return
        runs = set(self._runs(words))
        self._sizes.append(len(runs))
        for run in runs:
            self._records.setdefault(run, []).append(number)

    def overlap(self, texts: Iterable[str]) -> Overlap | None:
        """The evaluation record of which these texts hold most; None where they share nothing with any."""
        shared: Counter[int] = Counter()
        seen: set[str] = set()
        for text in texts:
            words = words_of(text)
            if len(words) < self.n:
                number = self._whole.get(" ".join(words))
                shared.update([] if number is None else [number])
                continue
            for run in self._runs(words):
                if run in self._records and run not in seen:
                    seen.add(run)
                    shared.update(self._records[run])
        if not shared:
            return None
        number = max(shared, key=lambda found: (shared[found] / self._sizes[found], -found))
        return Overlap(self.origins[number], min(1.0, shared[number] / self._sizes[number]))

    def _runs(self, words: list[str]) -> Iterator[str]:
        return (" ".join(words[first : first + self.n]) for first in range(len(words) - self.n + 1))


def words_of(text: str) -> list[str]:
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())
