"""All training documents, tokenised once at start-up and kept in flat arrays, with a report of what was refused.

A document is named by (part << 52) | (index of its file << 40) | line number; that name keys its noise and leads back to
file and line. A long text that was split has parts 1, 2, ... after its part 0. The two sides of a preference pair are
neighbours of one name.
What cannot be trained on is a bad row: broken, without an answer, too long. `on_bad_row` decides whether the first one
stops the run or whether they are counted, up to `max_bad_fraction`.
"""

import functools
import itertools
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from dfactory.config.data import DatasetKeys
from dfactory.data.chat import ChatEncoder, Tokens, token_ids
from dfactory.data.fields import BadRow, Completion, Document, Fault, Pair, Record, TokenIds, Trace
from dfactory.data.pairs import SIDES
from dfactory.data.progress import reading
from dfactory.data.records import read_records
from dfactory.data.traces import NO_TRACES, TraceRules
from dfactory.errors import ConfigError, DataError
from dfactory.packing import block_of, canvases, whole_blocks
from dfactory.types import EmbeddingInputs, Example, common_length

LINE_BITS, FILE_BITS, PART_BITS = 40, 12, 11  # of a document id, from its low end
ENCODE_BATCH = 1024  # records that the tokenizer gets at once
SHOWN_ORIGINS = 5  # a kind of fault in the report
SHOWN_COLUMNS = 8  # text columns that no reader uses, in the report

_Columns = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # input_ids, trainable, commit_step


@dataclass
class Refused:
    """The rows refused for one reason."""

    count: int = 0
    first: list[str] = field(default_factory=list)  # "file:line: message" of the first few


@dataclass
class DataReport:
    """What became of the rows of a set of files; `str()` prints it."""

    files: list[str]
    unit_size: int = 1  # documents that a row becomes: 2 for a preference pair
    kept: int = 0  # documents
    truncated: int = 0  # documents
    further_parts: int = 0  # documents that continue a split text
    left_out: int = 0  # rows, by trace_filter
    refused: dict[Fault, Refused] = field(default_factory=dict)
    unread: Counter[str] = field(default_factory=Counter)  # rows by text columns that no reader uses
    tokens: int = 0
    trainable_tokens: int = 0
    aligned_tokens: int = 0  # with the fill to whole blocks
    longest: int = 0  # document, in tokens

    @property
    def num_rows(self) -> int:
        """Rows that were kept."""
        return (self.kept - self.further_parts) // self.unit_size

    @property
    def num_refused(self) -> int:
        return sum(refused.count for refused in self.refused.values())

    def refuse(self, origin: str, bad: BadRow) -> None:
        """Count one row that cannot be used."""
        self.refuse_told(BadRow(bad.fault, f"{origin}: {bad}"))

    def refuse_told(self, bad: BadRow) -> None:
        """The same for a message that has its origin."""
        refused = self.refused.setdefault(bad.fault, Refused())
        refused.count += 1
        if len(refused.first) < SHOWN_ORIGINS:
            refused.first.append(str(bad))

    def refuse_share_above(self, max_bad_fraction: float) -> None:
        """Raises DataError where too large a share of the rows was refused."""
        share = self.num_refused / max(self.num_rows + self.num_refused, 1)
        if share > max_bad_fraction:
            raise DataError(
                f"{share:.2%} of the rows of {', '.join(self.files)} are unusable, max_bad_fraction is "
                f"{max_bad_fraction:g}: fix them or raise it\n{self}"
            )

    def __str__(self) -> str:
        pairs = f" ({self.num_rows} pairs)" if self.unit_size == 2 else ""
        lines = [
            f"{self.kept} documents{pairs} of {len(self.files)} file(s), {self.num_refused} rows refused, "
            f"{self.truncated} cut" + f", {self.further_parts} go on with a split text" * (self.further_parts > 0),
            f"{self.tokens} tokens ({self.aligned_tokens} in whole blocks), {self.trainable_tokens} trainable, "
            f"longest document {self.longest}",
        ]
        if self.left_out:
            lines.append(f"{self.left_out} traces left out, their response is not correct (trace_filter)")
        return "\n".join([*lines, *self.tell_refused(), *self.tell_unread()])

    def tell_refused(self) -> list[str]:
        """Lines on the rows that were refused, by reason, with the first few of each."""
        lines = []
        for fault, refused in sorted(self.refused.items(), key=lambda item: -item[1].count):
            lines.append(f"refused, {fault}: {refused.count}")
            lines += [f"  {origin}" for origin in refused.first]
        return lines

    def tell_unread(self) -> list[str]:
        """A line on the text columns that no reader uses, the most common first; empty if there are none."""
        rows = max(self.num_rows + self.left_out + self.num_refused, 1)
        common = sorted(self.unread.items(), key=lambda item: (-item[1], item[0]))
        shown = [f"{name} in {count / rows:.1%}" for name, count in common[:SHOWN_COLUMNS]]
        if not shown:
            return []
        shown[0] += " of the rows"
        more = f", {len(common) - len(shown)} more" if len(common) > len(shown) else ""
        return [f"text that nobody reads: {', '.join(shown)}{more}"]


class Examples(Sequence[Example]):
    """Tokenised documents in flat arrays: 4 bytes and 1 bit a token, 2 bytes more for traces. Indexing builds an Example."""

    def __init__(
        self,
        report: DataReport,
        document_id_E: np.ndarray,
        offset_E1: np.ndarray,
        input_ids: np.ndarray,
        trainable: np.ndarray,
        commit_step: np.ndarray | None = None,
        weight_E: np.ndarray | None = None,
    ):
        self.report = report
        self.unit_size = report.unit_size  # neighbours that belong together: 1, or 2 for chosen and rejected
        self.document_id_E = document_id_E  # int64
        self._offset_E1 = offset_E1  # int64, E + 1 of them
        self._input_ids = input_ids  # int32
        self._trainable_bits = np.packbits(trainable)
        self._commit_step = commit_step  # int16, where the run makes views from traces
        self._weight_E = weight_E  # float32, what each counts in the loss; None: 1 each

    def __len__(self) -> int:
        return len(self.document_id_E)

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        start, stop = self._offset_E1[index % len(self) :][:2].tolist()
        document_id = int(self.document_id_E[index])
        steps_T = None if self._commit_step is None else self._commit_step[start:stop]
        trainable_T, origin = self._trainable(start, stop), self.origin(document_id)
        return Example(document_id, self._input_ids[start:stop], trainable_T, origin, steps_T)

    @property
    def length_E(self) -> np.ndarray:
        """Tokens of each document, before the fill."""
        return np.diff(self._offset_E1)

    @property
    def file_index_E(self) -> np.ndarray:
        """Which of the files each document came from."""
        return _file_index(self.document_id_E)

    @property
    def file_index_U(self) -> np.ndarray:
        """Which of the files each unit came from."""
        return self.file_index_E[:: self.unit_size]

    @property
    def unit_lengths(self) -> np.ndarray:
        """Tokens of each unit, before the fill."""
        return self.length_E.reshape(-1, self.unit_size).sum(axis=1)

    def unit(self, index: int) -> list[Example]:
        """The documents that belong together: one, or the two sides of a pair."""
        return [self[member] for member in range(index * self.unit_size, (index + 1) * self.unit_size)]

    def unit_id(self, index: int) -> int:
        """The name of a unit's documents."""
        return int(self.document_id_E[index * self.unit_size])

    @property
    def trainable_U(self) -> np.ndarray:
        """int64: the response tokens of each unit, before the fill."""
        count_E = np.empty(len(self), np.int64)
        for first in range(0, len(self), ENCODE_BATCH):
            offset = self._offset_E1[first : first + ENCODE_BATCH + 1]
            trained = self._trainable(int(offset[0]), int(offset[-1])).astype(np.int64)
            count_E[first : first + len(offset) - 1] = np.add.reduceat(trained, offset[:-1] - offset[0])
        return count_E.reshape(-1, self.unit_size).sum(axis=1)

    def unit_weight(self, index: int) -> float:
        """What a unit counts in the loss."""
        return 1.0 if self._weight_E is None else float(self._weight_E[index * self.unit_size])

    def map_units(self, measure: Callable[["Examples"], np.ndarray]) -> np.ndarray:
        """A number for each unit."""
        return measure(self)

    def prefetch(self, index_V: np.ndarray) -> None:
        """These units are wanted next. All of them are there."""

    def origin(self, document_id: int) -> str:
        """The "file:line" that a document id names."""
        return _origin(self.report.files, document_id)

    def block_counts(self, block_size: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [E] twice: the blocks before a document's last response block, and those that hold a response token."""
        clean_E, response_E = np.zeros(len(self), np.int64), np.empty(len(self), np.int64)
        for first in range(0, len(self), ENCODE_BATCH):
            offset = self._offset_E1[first : first + ENCODE_BATCH + 1]
            length = np.diff(offset)
            trained = np.flatnonzero(self._trainable(int(offset[0]), int(offset[-1])))  # tokens of the chunk
            example = np.repeat(np.arange(len(length)), length)[trained]
            block = (trained - (offset[example] - offset[0])) // block_size
            is_new = np.ones(len(trained), bool)
            is_new[1:] = (np.diff(example) != 0) | (np.diff(block) != 0)
            response_E[first : first + len(length)] = np.bincount(example[is_new], minlength=len(length))
            clean_E[first + example] = block  # the last one of a document stays
        return clean_E, response_E

    def canvas_counts(self, canvas: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [E] twice: the tokens before a document's last canvas of `canvas` tokens, and those of all its canvases."""
        counts_E2 = np.zeros((len(self), 2), np.int64)
        for index, (start, stop) in enumerate(itertools.pairwise(self._offset_E1.tolist())):
            canvas_T = canvases(self._trainable(start, stop), canvas)
            counts_E2[index] = canvas_T.max(initial=0), (canvas_T >= 0).sum()
        return counts_E2[:, 0], counts_E2[:, 1]

    @functools.cached_property
    def common_length_U(self) -> np.ndarray:
        """int64: the tokens with which both sides of a preference pair begin, in all that enters an embedding; of a document
        alone none."""
        common_U = np.zeros(len(self) // self.unit_size, np.int64)
        for unit in range(len(common_U) if self.unit_size == 2 else 0):
            common_U[unit] = common_length(*map(self.embedding_inputs, (2 * unit, 2 * unit + 1)))
        return common_U

    def embedding_inputs(self, index: int) -> EmbeddingInputs:
        """Of the clean stream of a document, without the fill."""
        start, stop = self._offset_E1[index : index + 2].tolist()
        return EmbeddingInputs(self._input_ids[start:stop], noise=int(self.document_id_E[index]))

    @functools.cached_property
    def fingerprint(self) -> int:
        """A checksum of all documents, their order and their marks: a resumed run must see the same ones."""
        arrays = [self.document_id_E, self._offset_E1, self._input_ids, self._trainable_bits]
        arrays += [column for column in (self._commit_step, self._weight_E) if column is not None]
        return functools.reduce(lambda crc, array: zlib.crc32(array.tobytes(), crc), arrays, 0)

    def _trainable(self, start: int, stop: int) -> np.ndarray:
        bits = np.unpackbits(self._trainable_bits[start // 8 : (stop + 7) // 8])
        return bits[start % 8 :][: stop - start].astype(bool)


def load_examples(
    datasets: Sequence[DatasetKeys],
    encoder: ChatEncoder | None,
    *,
    max_length: int,
    overlong: str,
    on_bad_row: str,
    max_bad_fraction: float,
    block_size: int,
    eos_id: int,
    vocab_size: int,
    mask_id: int | None = None,
    fill_unit: int | None = None,
    paired: bool = False,
    traces: TraceRules = NO_TRACES,
    weighed: bool = True,
) -> Examples:
    """Read, tokenise and check every record of the entries.

    `encoder` may be None if all records come tokenised. A text ends with EOS, added where it does not, trainable where
    its last token is. `paired` is whether the records have to be preference pairs or must not be; `traces`
    what they need of a trace; `weighed` whether a record may have a weight.
    Raises DataError for a record of the other kind, for the first bad row (on_bad_row "error"), for too large a share of
    them ("skip"), for an unreadable file, and if nothing is left; ConfigError if blocks do not divide max_length.
    """
    if max_length != whole_blocks(max_length, block_size):
        raise ConfigError(f"block_size {block_size} does not divide max_length {max_length}: use a multiple of it")
    if len(datasets) > 1 << FILE_BITS:
        raise ConfigError(
            f"datasets names {len(datasets)} files: at most {1 << FILE_BITS} can be distinguished; join some"
        )
    rules = DocumentRules(max_length, overlong, eos_id, vocab_size, mask_id, traces, weighed)
    report = DataReport([entry.label for entry in datasets], unit_size=2 if paired else 1)
    builder = ExamplesBuilder(report, on_bad_row, block_size, fill_unit)
    with reading([entry.path for entry in datasets if entry.path], "tokenising") as advance:
        for file_index, entry in enumerate(datasets):
            records = read_records(entry, paired, advance, report.unread)
            for row in read_documents(records, entry.label, encoder, rules):
                require_kind(row.record, paired, f"{entry.label}:{row.number}")
                builder.add((file_index << LINE_BITS) | row.number, row.finished)
    return builder.finish(max_bad_fraction)


@dataclass(frozen=True)
class DocumentRules:
    """What a document must be like to be trained on."""

    max_length: int
    overlong: str
    eos_id: int
    vocab_size: int
    mask_id: int | None = None
    traces: TraceRules = NO_TRACES
    weighed: bool = True  # whether its `weight` may be other than 1


class EncodedRow(NamedTuple):
    """A row of a file on all its stages."""

    number: int
    record: Record | BadRow
    encoded: "Encoded | BadRow"  # without the EOS that is added, before it is cut
    finished: "list[Finished] | BadRow | None"  # what is trained on; None: left out by trace_filter


def read_documents(
    records: Iterator[tuple[int, Record | BadRow]], path: str, encoder: ChatEncoder | None, rules: DocumentRules
) -> Iterator[EncodedRow]:
    """Tokenise and check numbered records of a file, in bounded memory. A bad row is a value."""
    for batch in _batched(records, ENCODE_BATCH):
        for (number, record), encoded in zip(batch, _encode(batch, encoder, path), strict=True):
            yield EncodedRow(number, record, encoded, _finish(rules, record, encoded))


def require_kind(record: Record | BadRow, paired: bool, origin: str) -> None:
    """A run trains on pairs or on single answers. Raises DataError for a record of the other kind."""
    if isinstance(record, BadRow) or isinstance(record, Pair) == paired:
        return
    if paired:
        raise DataError(
            f"{origin} holds a single answer, but stage dpo compares two: give rows with prompt, chosen and rejected, or "
            "set stage: sft"
        )
    raise DataError(
        f"{origin} holds a preference pair (chosen, rejected), but the stage trains on single answers: set stage: dpo, or "
        "give rows with messages, or with prompt and completion"
    )


def documents_of(record: Record) -> tuple[Document, ...]:
    return tuple(record) if isinstance(record, Pair) else (record,)


Encoded = list[Tokens | BadRow]  # the documents of one row


def _encode(batch: list[tuple[int, Record | BadRow]], encoder: ChatEncoder | None, path: str) -> list[Encoded | BadRow]:
    """The documents of each row, tokenised; all of them in one call of the tokenizer."""
    rows = [record if isinstance(record, BadRow) else documents_of(record) for _, record in batch]
    good = [document for row in rows if not isinstance(row, BadRow) for document in row]
    if encoder is None:
        for (number, _), row in zip(batch, rows, strict=True):
            if not isinstance(row, BadRow) and not all(isinstance(document, TokenIds) for document in row):
                raise ConfigError(f"{path}:{number} holds text but the model directory has no tokenizer: give one")
    try:
        encoded = iter(encoder.encode_records(good) if encoder else map(token_ids, good))
    except Exception as problem:
        problem.add_note(f"while encoding {path}:{batch[0][0]} to {path}:{batch[-1][0]}")
        raise
    return [row if isinstance(row, BadRow) else list(itertools.islice(encoded, len(row))) for row in rows]


class Finished(NamedTuple):
    """One document of a row, as it is kept."""

    tokens: Tokens
    was_cut: bool = False
    part: int = 0  # of a split text
    commit_step_T: np.ndarray | None = None  # where views are made from traces
    weight: float = 1.0  # in the loss


def _finish(rules: DocumentRules, record: Record | BadRow, encoded: Encoded | BadRow) -> list[Finished] | BadRow | None:
    """All documents of a row, or none; None for what trace_filter leaves out."""
    if isinstance(encoded, BadRow):
        return encoded
    if rules.traces.leave_out(_trace_of(record)):
        return None
    documents = documents_of(record)
    if documents[0].weight != 1 and not rules.weighed:
        return BadRow(
            Fault.FIELD,
            f"weight is {documents[0].weight:g}: the stage counts every record the same; leave the column out",
        )
    outcomes = [_apply(rules, *one) for one in zip(documents, encoded, strict=True)]
    for side, outcome in enumerate(outcomes):
        if isinstance(outcome, BadRow):
            return BadRow(outcome.fault, f"{SIDES[side]}: {outcome}") if isinstance(record, Pair) else outcome
    finished = [document._replace(weight=documents[0].weight) for outcome in outcomes for document in outcome]
    return (isinstance(record, Pair) and _wrong_pair(*finished)) or finished


def _wrong_pair(chosen_side: Finished, rejected_side: Finished) -> BadRow | None:
    """What shows only in the tokens: a template or a cut may bring sides together, or their prompts apart."""
    chosen, rejected = chosen_side.tokens, rejected_side.tokens
    if np.array_equal(chosen[0], rejected[0]):
        return BadRow(Fault.EQUAL_SIDES, "chosen and rejected have the same tokens: there is nothing to prefer")
    prompts = [ids[: trainable.argmax()] for ids, trainable in (chosen, rejected)]
    if not np.array_equal(*prompts):
        return BadRow(
            Fault.TWO_PROMPTS,
            f"the prompts of chosen and rejected come out as different tokens ({len(prompts[0])} and {len(prompts[1])}): "
            "give a chat template that renders earlier turns the same whatever follows",
        )
    return None


def _trace_of(record: Record) -> Trace | None:
    return record.trace if isinstance(record, TokenIds) else None


def _apply(rules: DocumentRules, record: Document, tokens: Tokens | BadRow) -> list[Finished] | BadRow:
    """End with EOS, check, cut or split."""
    if isinstance(tokens, BadRow):
        return tokens
    ids, trainable = tokens
    if not trainable.any():
        return BadRow(Fault.NO_ANSWER, "no token is trainable: the record needs an answer")
    if wrong := _wrong_id(rules, ids) or rules.traces.find_fault(_trace_of(record)):
        return wrong
    if not isinstance(record, TokenIds) and ids[-1] != rules.eos_id:
        ids, trainable = np.append(ids, np.int32(rules.eos_id)), np.append(trainable, trainable[-1])
    limit, trace = rules.max_length, _trace_of(record)
    ids, trainable = rules.traces.whole_canvas(trace, ids, trainable, rules.mask_id)
    steps = trace.commit_step_T[:limit] if rules.traces.block_size else None
    if len(ids) <= limit:
        return [Finished((ids, trainable), commit_step_T=steps)]
    if steps is not None and trace.canvas:
        return BadRow(
            Fault.TOO_LONG,
            f"the trace's canvas has {len(ids)} tokens, max_length is {limit}, and it cannot be cut, because every forward "
            "saw all of it: raise max_length",
        )
    if rules.overlong == "split":
        return _split(ids, trainable, limit, isinstance(record, Completion) and not record.prompt)
    if not trainable[:limit].any():
        prompt = int(trainable.argmax())
        return BadRow(Fault.PROMPT_TOO_LONG, f"the prompt alone has {prompt} tokens, max_length is {limit}: raise it")
    if rules.overlong == "truncate":
        return [Finished((ids[:limit], trainable[:limit]), was_cut=True, commit_step_T=steps)]
    return BadRow(
        Fault.TOO_LONG,
        f"the document has {len(ids)} tokens, max_length is {limit}: raise max_length or set overlong: truncate",
    )


def _split(ids: np.ndarray, trainable: np.ndarray, limit: int, is_text: bool) -> list[Finished] | BadRow:
    """A text in documents of `limit` tokens, the last one shorter. Each begins at position 0 and knows nothing of the
    others; only the first one has the BOS of a tokenizer that adds it, and only the last one the EOS."""
    starts = range(0, len(ids), limit)
    if not trainable.all() and not is_text:
        reason = "has a prompt, without which its answer cannot go on in another document"
    elif len(starts) > 1 << PART_BITS:
        reason = f"would be split into {len(starts)} documents, more than {1 << PART_BITS}"
    else:
        return [Finished((ids[i : i + limit], trainable[i : i + limit]), part=n) for n, i in enumerate(starts)]
    return BadRow(Fault.TOO_LONG, f"the document has {len(ids)} tokens, max_length is {limit}, and it {reason}")


def _wrong_id(rules: DocumentRules, ids: np.ndarray) -> BadRow | None:
    if ids.max() >= rules.vocab_size:
        where = int(ids.argmax())
        return BadRow(
            Fault.VOCABULARY, f"input_ids[{where}] is {ids[where]}: the vocabulary has {rules.vocab_size} tokens"
        )
    if rules.mask_id is not None and (ids == rules.mask_id).any():
        where = int((ids == rules.mask_id).argmax())
        return BadRow(
            Fault.SPECIAL_TOKEN,
            f"input_ids[{where}] is the mask {rules.mask_id}: only noise may put it there; drop the record, or where the "
            "recipe chooses the mask (mask_token) name another token",
        )
    return None


class ExamplesBuilder:
    """Gathers documents, counts bad rows."""

    def __init__(self, report: DataReport, on_bad_row: str, block_size: int, fill_unit: int | None = None):
        self.report, self.on_bad_row = report, on_bad_row
        self.block_size, self.fill_unit = block_size, fill_unit or block_size
        self.document_ids: list[int] = []
        self.lengths: list[int] = []
        self.weights: list[float] = []
        self.chunks: list[_Columns] = []  # joined now and then: a small array a document would cost more than it holds
        self.loose: list[_Columns] = []

    def add(self, document_id: int, outcome: list[Finished] | BadRow | None) -> None:
        """One row: its documents get the same name, apart from the part."""
        if isinstance(outcome, BadRow):
            return self._refuse(_origin(self.report.files, document_id), outcome)
        self.report.left_out += outcome is None
        for document in outcome or ():
            self._keep(document_id, document)

    def _keep(self, document_id: int, document: Finished) -> None:
        tokens, length = document.tokens, len(document.tokens[0])
        self.document_ids.append(document.part << LINE_BITS + FILE_BITS | document_id)
        self.lengths.append(length)
        self.weights.append(document.weight)
        self.loose.append((*tokens, document.commit_step_T))
        if len(self.loose) >= ENCODE_BATCH:
            self.chunks, self.loose = [*self.chunks, _concatenate(self.loose)], []
        report = self.report
        report.kept += 1
        report.truncated += document.was_cut
        report.further_parts += document.part > 0
        report.tokens += length
        report.trainable_tokens += int(tokens[1].sum())
        size = int(block_of(length, self.block_size, self.fill_unit))
        report.aligned_tokens += length + -length % size
        report.longest = max(report.longest, length)

    def _refuse(self, origin: str, bad: BadRow) -> None:
        if self.on_bad_row == "error":
            raise DataError(f"{origin}: {bad}; or set on_bad_row: skip to go on without such rows") from bad
        self.report.refuse(origin, bad)

    def finish(self, max_bad_fraction: float) -> Examples:
        report, files = self.report, ", ".join(self.report.files)
        if not report.kept:
            raise DataError(f"no record of {files} can be trained on:\n{report}")
        report.refuse_share_above(max_bad_fraction)
        return self.examples()

    def examples(self) -> Examples:
        """What was gathered, at least one document."""
        input_ids, trainable, steps = _concatenate([*self.chunks, *self.loose])
        offsets = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        weights = np.array(self.weights, np.float32) if any(weight != 1 for weight in self.weights) else None
        names = np.array(self.document_ids, np.int64)
        return Examples(self.report, names, offsets, input_ids, trainable, steps, weights)


def _origin(files: list[str], document_id: int) -> str:
    return f"{files[_file_index(document_id)]}:{document_id & ((1 << LINE_BITS) - 1)}"


def _file_index(document_id):
    """Of one document id, or of an array of them."""
    return document_id >> LINE_BITS & (1 << FILE_BITS) - 1


def _concatenate(parts: list[_Columns]) -> _Columns:
    """Join documents, column by column; steps are in all of them or in none."""
    return tuple(None if column[0] is None else np.concatenate(column) for column in zip(*parts, strict=True))


def _batched(items: Iterator, size: int) -> Iterator[list]:
    while batch := list(itertools.islice(items, size)):
        yield batch
