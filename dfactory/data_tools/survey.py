"""What `validate` counts while rows go by. Memory: 32 bytes a row, whatever the rows hold."""

import re
from array import array
from collections import Counter
from collections.abc import Iterable

import numpy as np

from dfactory.data.chat import ChatEncoder, special_literals
from dfactory.data.examples import SHOWN_ORIGINS, DataReport, DocumentRules, EncodedRow, documents_of
from dfactory.data.fields import BadRow, Completion, Conversation, Document, Pair, Record, TokenIds
from dfactory.data_tools.identity import prompt_key, record_key

KINDS = {Conversation: "conversation", Completion: "text"}


class Survey:
    """Counts over the rows of some files. `encoder` may be None: then nothing is said of tokens and special tokens."""

    def __init__(self, files: list[str], encoder: ChatEncoder | None, rules: DocumentRules | None):
        self.files, self._eos_id = files, rules and rules.eos_id
        literals = sorted(special_literals(encoder.tokenizer), key=len, reverse=True) if encoder else []
        self._literal = re.compile("|".join(map(re.escape, literals)) or "(?!)")
        self.report = DataReport(files)
        self.kinds, self.roles, self.spelt, self.turns = Counter(), Counter(), Counter(), Counter()
        self.num_rows = self.with_tools = self.left_out = 0
        self.first_spelt: dict[str, str] = {}
        self.trainable_tokens = 0
        self._length, self._origin = array("I"), array("Q")
        self._prompt, self._record = array("Q"), array("Q")

    def add(self, file_index: int, row: EncodedRow) -> None:
        """One row, tokenised or not."""
        self.num_rows += 1
        origin = f"{self.files[file_index]}:{row.number}"
        if isinstance(row.record, BadRow):
            return self.report.refuse(origin, row.record)
        if isinstance(row.finished, BadRow):
            self.report.refuse(origin, row.finished)
        elif row.finished is None:
            self.left_out += 1
        self._describe(row.record, origin)
        self._prompt.append(prompt_key(row.record))
        self._record.append(record_key(row.record))
        self._origin.append(file_index << 40 | row.number)
        for document, tokens in zip(documents_of(row.record), row.encoded, strict=False):  # none without a tokenizer
            if not isinstance(tokens, BadRow):
                self._measure(document, *tokens)

    @property
    def bad_share(self) -> float:
        return self.report.num_refused / max(self.num_rows, 1)

    @property
    def length_D(self) -> np.ndarray:
        """Tokens of each document that could be tokenised, before it is cut."""
        return np.frombuffer(self._length, np.uint32) if self._length else np.zeros(0, np.uint32)

    @property
    def num_prompts(self) -> int:
        return len(np.unique(np.frombuffer(self._prompt, np.uint64))) if self._prompt else 0

    def duplicates(self) -> tuple[int, list[str]]:
        """How many rows repeat an earlier one, and the first few as "file:line repeats file:line"."""
        if not self._record:
            return 0, []
        key = np.frombuffer(self._record, np.uint64)
        order = np.argsort(key, kind="stable")
        repeats = np.flatnonzero(key[order][1:] == key[order][:-1]) + 1
        shown = sorted((int(order[at]), int(order[at - 1])) for at in repeats)[:SHOWN_ORIGINS]
        return len(repeats), [f"{self._name(later)} repeats {self._name(earlier)}" for later, earlier in shown]

    def _measure(self, document: Document, ids_T: np.ndarray, trainable_T: np.ndarray) -> None:
        """Tokens as training has them: with an EOS where a text does not end with one."""
        ends = isinstance(document, TokenIds) or not len(ids_T) or ids_T[-1] == self._eos_id
        self._length.append(len(ids_T) + (not ends))
        self.trainable_tokens += int(trainable_T.sum()) + (not ends and bool(trainable_T[-1]))

    def _name(self, index: int) -> str:
        origin = self._origin[index]
        return f"{self.files[origin >> 40]}:{origin & (1 << 40) - 1}"

    def _describe(self, record: Record, origin: str) -> None:
        documents = documents_of(record)
        name = KINDS.get(type(documents[0]), "token ids")
        self.kinds[f"{name} pair" if isinstance(record, Pair) else name] += 1
        for text in {text for document in documents for text in self._texts(document)}:
            for literal in set(self._literal.findall(text)):
                self.spelt[literal] += 1
                self.first_spelt.setdefault(literal, origin)

    def _texts(self, document: Document) -> Iterable[str]:
        if isinstance(document, Completion):
            yield from (document.prompt, document.completion)
        elif isinstance(document, Conversation):
            self.turns[sum(message["role"] == "assistant" for message in document.messages)] += 1
            self.with_tools += bool(document.tools)
            for message in document.messages:
                self.roles[message["role"]] += 1
                yield message["content"]
