"""Hostile files of records: `python -m tests.data.fuzz --lines 1000000` for the long run, test_fuzz.py for the quick one.

A file is made of lines that were right once and were then broken, of any JSON, and of any bytes; it comes plain, gzipped,
cut short, or as parquet. From the lines of a file further files are made: with bytes changed, put in, cut out, and halves of
two lines joined. Reading one has to end with documents, with rows that are refused with a reason, or with a DataError that
names the file; and no text may ever turn into the mask. Last come lines of 50 MB.
"""

import argparse
import copy
import gzip
import json
import random
import re
import resource
import tempfile
import time
import zlib
from collections import Counter, deque
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from dfactory.config.data import DatasetKeys
from dfactory.data.chat import ChatEncoder
from dfactory.data.examples import DocumentRules, read_documents
from dfactory.data.fields import BadRow, Fault
from dfactory.data.prompts import Row, encode_prompt, prompt_of, read_rows, rows_of
from dfactory.data.records import read_records
from dfactory.data.streaming import StreamedExamples
from dfactory.errors import DataError
from tests.data.conftest import EOS, MASK, SPECIAL, make_tokenizer

LINES = 25  # of a file
VARIANTS = 9  # files that are made of the lines of a drawn one, and of earlier ones
DRAWN_TOGETHER = 200  # files; hypothesis keeps what it drew
POOL = 2000  # lines that variants are made of
HUGE = 50 * 2**20  # bytes of a huge line
SCALARS = re.compile(rb'"(?:[^"\\]|\\.){0,200}"(?!:)|-?\d[\d.eE+]*|true|false|null')
DEPTHS = (2, 90, 99, 101, 400, 990, 1000, 10_000)
USER, BOT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}
RIGHT = (
    {"messages": [USER, BOT, USER, BOT]},
    {"messages": [USER, CALL, {"role": "tool", "content": "1"}, BOT], "tools": [{"name": "f"}]},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
    {"input_ids": [9, 10, 11], "prompt_lengths": 1},
    {"prompt": "hi", "completion": "yo"},
    {"prompt": [USER], "completion": [BOT]},
    {"instruction": "hi", "input": "", "output": "yo"},
    {"text": "hi yo"},
    {"prompt": "hi", "chosen": "yo", "rejected": "no"},
    {"chosen": [USER, BOT], "rejected": [USER, {"role": "assistant", "content": "no"}]},
    {"prompt_ids": [9], "chosen_ids": [10], "rejected_ids": [11]},
    {"prompt_ids": [9, 9], "token_ids": [10, 11], "commit_step": [0, 1], "block_size": 4},
    {"instruction": "hi", "context": "a", "system": "b", "history": [["a", "b"]], "response": "yo"},
    {"messages": [USER, {**BOT, "weight": 0, "reasoning_content": "a"}, USER, BOT], "system": "a", "language": "b"},
    {"conversations": [{"from": "function_call", "value": '{"name": "f", "arguments": {"a": null}}'}], "tools": "[]"},
    {"conversations": [{"from": "human", "value": "hi"}], "chosen": {"from": "gpt", "value": "yo"}, "rejected": "no"},
    {"system": "a", "question": "hi", "chosen": "yo", "rejected": "no"},
    {"messages": [USER, {**BOT, "tool_calls": [], "function_call": {"name": "f", "arguments": ""}}], "tools": None},
    {"prompt": [USER], "answer": 4, "label": False, "images": []},
    {"input_ids": [9, 10], "prompt_lengths": 1, "labels": [-100, 10], "attention_mask": [1, 1]},
    {"prompt_ids": [9], "prompt": "hi"},
)
NASTY = (
    *SPECIAL, "<|mask|", "\0", "\ud800", "\udfff", "\u202e", "\u200f", "\ufeff", "\U000f0000", "\u2028", "\r", "\x85",
    "", " " * 3000, "\n\n", "{% generation %}", "{{ 1 }}", "\U0001f600", "a\u0301" * 50,
)  # fmt: skip
NUMBERS = (0, -1, 1.5, 1e308, 2**31, 2**63, -(10**30), True, False, None, MASK, 10**6)


def _is_utf8(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


TRAITS = {  # of files that are not packed
    "byte order mark": lambda body: body.startswith(b"\xef\xbb\xbf"),
    "not UTF-8": lambda body: not _is_utf8(body),
    "lone surrogate": lambda body: any(one in body for one in (b"\\ud8", b"\\udf", b"\xed\xa0", b"\xed\xbf")),
    "NUL": lambda body: b"\0" in body or b"\\u0000" in body,
    "number for a string": lambda body: b'"content": 1.5' in body,
    "nested 10,000 deep": lambda body: b"[" * 10_000 in body or b'{"a":' * 10_000 in body,
    "CRLF": lambda body: b"\r\n" in body,
    "no last newline": lambda body: not body.endswith(b"\n"),
    "key twice": lambda body: any(line.count(b'"messages": ') > 1 for line in body.splitlines()),
    "empty turn": lambda body: b'"content": ""' in body,
    "wrong order of roles": lambda body: b'[{"role": "assistant"' in body,
    "text of a special token": lambda body: b"<|mask|>" in body,
    "right-to-left mark": lambda body: "\u200f".encode() in body or b"\\u200f" in body,
}

texts = st.lists(
    st.one_of(st.sampled_from(NASTY), st.text('ab \t"\\{}<|>\u00e9\u6f22\u0416', max_size=8)), max_size=4
).map("".join)
values = st.one_of(
    texts,
    st.sampled_from(NUMBERS),
    st.sampled_from([[], {}, [[]], [{}], [None], [1], ["a"], {"role": []}, [USER], [BOT, BOT], [BOT, USER]]),
)


@st.composite
def records(draw) -> dict:
    """A right record, a few of whose parts were replaced, removed or swapped."""
    record = json.loads(json.dumps(draw(st.sampled_from(RIGHT))))
    for _ in range(draw(st.integers(0, 3))):
        parent = record
        while True:
            keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if not isinstance(parent[key], (dict, list)) or draw(st.booleans()):
                _break(draw, parent, key)
                break
            parent = parent[key]
    return record


def _break(draw, parent, key) -> None:
    how = draw(st.integers(0, 5))
    if how == 0:
        del parent[key]
    elif how == 1 and isinstance(parent, list):
        parent.reverse()
    elif how == 2 and isinstance(parent, dict):
        parent[draw(texts)] = parent[key]
    else:
        parent[key] = copy.deepcopy(draw(values))  # it may be broken in its turn


@st.composite
def lines(draw) -> bytes:
    """A record as JSON, with whatever can be wrong with bytes."""
    text = json.dumps(draw(records()), ensure_ascii=draw(st.booleans()))
    how = draw(st.integers(0, 11))
    if how == 0:  # a value that is nested deeper than anything that walks through it
        depth = draw(st.sampled_from(DEPTHS))
        nested = draw(st.sampled_from(["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "[" * depth]))
        old = draw(st.sampled_from(['"hi"', '"yo"', '"user"', "1", '"f"']))
        text = text.replace(old, draw(st.sampled_from([nested, json.dumps(nested), f'"yo", "x": {nested}'])), 1)
    elif how == 1:  # keys that stand twice
        text = text.replace("{", f'{{"messages": {json.dumps(draw(values))}, ', 1)
    elif how == 2:
        text = text.replace('"hi"', draw(st.sampled_from(["1e999", "NaN", "-Infinity", "9" * 5000, "0123"])))
    data = text.encode("utf-8", "surrogatepass")
    if how in (3, 4, 5):  # bytes put in, or cut off
        at = draw(st.integers(0, len(data)))
        put = draw(
            st.sampled_from([b"", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\0", b"\xef\xbb\xbf", b"\xf4\x90\x80\x80"])
        )
        data = data[:at] + put + (b"" if how == 3 else data[at:])
    elif how == 6:
        data = draw(st.binary(max_size=40)).replace(b"\n", b"")
    elif how == 7:
        data = data * draw(st.integers(0, 3))
    return data


@st.composite
def files(draw) -> tuple[str, bytes]:
    """(the name's end, the bytes) of a file."""
    rows = draw(st.lists(lines(), min_size=LINES, max_size=LINES))
    body = draw(st.sampled_from([b"\n", b"\r\n"])).join(rows) + draw(st.sampled_from([b"", b"\n", b"\r\n", b"\n\n"]))
    body = draw(st.sampled_from([b"", b"\xef\xbb\xbf", b"\n"])) + body
    kind = draw(st.sampled_from([".jsonl", ".jsonl", ".jsonl", ".jsonl.gz", ".parquet"]))
    if kind == ".parquet":
        columns = ["text"] if draw(st.booleans()) else ["prompt", "completion"]
        sink = pa.BufferOutputStream()
        table = pa.table(
            {name: pa.array(rows, pa.binary()).view(pa.string()) for name in columns}
        )  # not UTF-8: who knows
        pq.write_table(table, sink)
        body = sink.getvalue().to_pybytes()
    elif kind == ".jsonl.gz":
        body = gzip.compress(body, 1)
    if kind != ".jsonl" and draw(st.booleans()):
        body = body[: draw(st.integers(0, len(body)))]
    return kind, body


class Variants:
    """Files of lines that were read before, most of them with something changed."""

    def __init__(self, number: int):
        self.chance, self.pool = random.Random(number), deque(maxlen=POOL)

    def learn(self, body: bytes) -> None:
        self.pool.extend(body.splitlines())

    def __call__(self) -> bytes:
        return b"\n".join(self._line() for _ in range(LINES))

    def _line(self) -> bytes:
        line, at = self.chance.choice(self.pool), self.chance.randrange
        if at(4):
            line = self._with_other_values(line)
        for _ in range(max(0, at(6) - 3)):
            here, there = sorted(at(len(line) + 1) for _ in range(2))
            how = at(5)
            if how == 0:  # another byte
                line = line[:here] + bytes([at(256)]) + line[here + 1 :]
            elif how == 1:
                line = line[:here] + line[there:]
            elif how == 2 and len(line) < 100_000:  # a piece twice
                line = line[:there] + line[here:]
            elif how == 3:
                line = line[:here] + self.chance.choice(NASTY).encode("utf-8", "surrogatepass") + line[here:]
            else:
                other = self.chance.choice(self.pool)
                line = line[:here] + other[at(len(other) + 1) :]
        return line.replace(b"\n", b"")

    def _with_other_values(self, line: bytes) -> bytes:
        """Strings and numbers in place of others: what was JSON stays JSON."""
        for _ in range(1 + self.chance.randrange(3)):
            found, others = (list(SCALARS.finditer(one)) for one in (line, self.chance.choice(self.pool)))
            if not found or not others:
                break
            old, new = self.chance.choice(found), self.chance.choice(others).group()
            if self.chance.randrange(3) == 0:
                new = json.dumps(self.chance.choice(NASTY + NUMBERS)).encode()
            line = line[: old.start()] + new + line[old.end() :]
        return line


HUGE_LINES = {
    "words": lambda: b'{"text": "' + b"hi yo " * (HUGE // 6) + b'"}',
    "a word": lambda: b'{"text": "' + b"a" * HUGE + b'"}',
    "a turn": lambda: b'{"messages": [{"role": "user", "content": "' + b"yo " * (HUGE // 3) + b'"}]}',
    "turns": lambda: json.dumps({"messages": [USER, BOT] * (HUGE // 80)}).encode(),
    "ids": lambda: b'{"input_ids": [' + b"9," * (HUGE // 2) + b"9]}",
    "brackets": lambda: b"[" * HUGE,
    "keys": lambda: b"{" + b'"k":1,' * (HUGE // 6) + b'"k":1}',
    "zeros": lambda: bytes(HUGE),
    "quotes": lambda: b'{"text": "' + b'\\"' * (HUGE // 2) + b'"}',
}


class Reader:
    """Reads a hostile file in every way that there is."""

    def __init__(self, folder: Path):
        self.folder, tokenizer = folder, make_tokenizer()
        self.encoder = ChatEncoder(tokenizer)
        self.rules = DocumentRules(48, "truncate", EOS, len(tokenizer), MASK)
        self.lines, self.kept, self.refused, self.broken = 0, 0, dict.fromkeys(Fault, 0), 0
        self.seen: Counter[str] = Counter()  # files with each trait

    def read(self, kind: str, body: bytes) -> None:
        file = self.folder / f"fuzz{kind}"
        file.write_bytes(body)
        self.lines += body.count(b"\n") + (not body.endswith(b"\n")) if kind == ".jsonl" else LINES
        self._look(kind, body)
        for paired in (False, True):
            self._told(file, lambda paired=paired: self._documents(str(file), paired))
        if kind == ".jsonl":
            self._told(file, lambda: self._streamed(str(file)))
            self._told(file, lambda: read_rows(file))
        self._told(file, lambda: [self._told(file, self._prompt, *row) for row in rows_of(file)])

    def _look(self, kind: str, body: bytes) -> None:
        if kind == ".jsonl":
            self.seen.update(name for name, has in TRAITS.items() if has(body))
        elif kind == ".jsonl.gz":
            try:
                gzip.decompress(body)
            except (EOFError, zlib.error, OSError):
                self.seen["gz cut short"] += 1

    def _told(self, file: Path, read, *arguments) -> None:
        """Anything but a DataError that names the file rises."""
        try:
            read(*arguments)
        except DataError as problem:
            if str(file) not in str(problem):
                raise AssertionError("the message does not name the file") from problem
            self.broken += 1

    def _documents(self, file: str, paired: bool) -> None:
        for row in read_documents(read_records(file, paired), file, self.encoder, self.rules):
            if isinstance(row.finished, BadRow):
                assert str(row.finished)
                self.refused[row.finished.fault] += 1
                continue
            for document in row.finished or ():
                self.kept += 1
                assert MASK not in document.tokens[0]

    def _prompt(self, origin: str, fields: dict | BadRow) -> None:
        if isinstance(fields, BadRow):
            raise DataError(f"{origin}: {fields}")
        assert MASK not in encode_prompt(Row(origin, fields), self.encoder) or fields.get("prompt_ids") is not None
        assert isinstance(prompt_of(Row(origin, fields)), (str, list))

    def _streamed(self, file: str) -> None:
        options = {"on_bad_row": "skip", "max_bad_fraction": 1.0, "block_size": 4, "paired": False}
        StreamedExamples([DatasetKeys(file)], self.encoder, self.rules, **options)


def fuzz(reader: Reader, num_lines: int, first_seed: int = 0) -> None:
    """Read files of about so many lines in all, the same ones every time for a seed."""
    variants = Variants(first_seed)
    for number in range(max(1, num_lines // (LINES * (1 + VARIANTS) * DRAWN_TOGETHER))):
        left = num_lines - number * LINES * (1 + VARIANTS) * DRAWN_TOGETHER
        drawn = min(DRAWN_TOGETHER, max(1, left // (LINES * (1 + VARIANTS))))

        @seed(first_seed + number)
        @settings(max_examples=drawn, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(files())
        def run(file: tuple[str, bytes]) -> None:
            kind, body = file
            reader.read(kind, body)
            if kind == ".jsonl":
                variants.learn(body)
            for _ in range(VARIANTS if variants.pool else 0):
                reader.read(".jsonl", variants())

        run()


def read_huge(reader: Reader) -> None:
    """Each huge line between two right ones, plain and gzipped."""
    right = json.dumps({"text": "hi yo"}).encode()
    for name, make in HUGE_LINES.items():
        body, started = b"\n".join([b'{"text": "hi yo"}', make(), right]), time.perf_counter()
        reader.read(".jsonl", body)
        reader.read(".jsonl.gz", gzip.compress(body, 1))
        print(f"50 MB of {name}: {time.perf_counter() - started:.1f} s, {peak_memory()} MB", flush=True)


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def main() -> None:
    parser = argparse.ArgumentParser(description="read hostile files of records")
    parser.add_argument("--lines", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    started, arguments = time.perf_counter(), parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        reader = Reader(Path(folder))
        fuzz(reader, arguments.lines, arguments.seed)
        seconds = time.perf_counter() - started
        print(f"{reader.lines:,} lines in {seconds:.0f} s ({reader.lines / seconds:.0f} a second), no crash")
        read_huge(reader)
    print(f"{reader.kept} documents kept, {reader.broken} DataErrors that name the file; rows refused:")
    print("\n".join(f"  {fault.value:55} {count}" for fault, count in reader.refused.items() if count))
    print("files with:")
    print("\n".join(f"  {name:55} {reader.seen[name]}" for name in (*TRAITS, "gz cut short")))
    print(f"peak memory {peak_memory()} MB")


if __name__ == "__main__":
    main()
