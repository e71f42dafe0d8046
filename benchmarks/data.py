"""A large file of records: `validate`, the start of training, and the rate of the training reader.

    python -m benchmarks.data                                     # 200,000 records of 2,000 bytes
    python -m benchmarks.data --records 2000000 --keep big.jsonl  # 4 GB; about an hour on a core

The records are conversations of random words, numbered, so that none repeats. What is measured runs in a process of its own,
whose peak of resident memory and processor seconds the kernel tells.

    rate       the training reader in one thread: tokenise, render, check and align records of about 200 tokens
    start      `dfactory train` with `streaming: true` up to the end of the first optimiser step
    rows       `dfactory data validate` without a tokenizer
    validate   `dfactory data validate --model tiny`
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from dfactory.config.data import DatasetKeys
from dfactory.data.examples import load_examples
from dfactory.packing import align
from dfactory.vocabulary import read_vocabulary

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "dfactory" / "assets" / "tiny" / "tokenizer.json"
RECIPE = ROOT / "recipes" / "quickstart" / "sft.yaml"
RATE_TOKENS = 200  # of a record, about, where the reader's rate is measured
MEMORY_BAR_MIB, RATE_BAR = 1024, 20_000


class Usage(NamedTuple):
    """Of a process that ended."""

    seconds: float
    cpu_seconds: float
    peak_mib: float  # resident


def write_records(path: Path, count: int, size: int, seed: int = 0) -> None:
    """`count` lines of about `size` bytes: a question of a tenth of it, and its answer."""
    rng = random.Random(seed)
    words = known_words()
    room = max(4, round((size - 110) / (1 + statistics.mean(map(len, words)))))  # words of a line
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            drawn = rng.choices(words, k=room)
            question = f"{number}: {' '.join(drawn[: room // 10])}?"
            messages = [("user", question), ("assistant", " ".join(drawn[room // 10 :]))]
            row = {"messages": [{"role": role, "content": text} for role, text in messages]}
            file.write(json.dumps(row) + "\n")


def known_words() -> list[str]:
    """The words that are a token of the embedded tokenizer: 5 to 6 bytes a token, as with a large one on plain text."""
    tokens = json.loads(TOKENIZER.read_text(encoding="utf-8"))["model"]["vocab"]
    return sorted(token[1:] for token in tokens if token.startswith("Ġ") and token[1:].isalpha() and len(token) > 3)


# A process's peak begins with what its parent has in use when it starts it, so a small one has to start it.
LAUNCHER = """
import os, subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, used = os.wait4(child.pid, 0)
print(os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, used.ru_maxrss)
"""


def measure(*words: object, threads: bool = True) -> Usage:
    """Run `python -m dfactory.cli WORDS`. Raises CalledProcessError if it fails."""
    command = [sys.executable, "-m", *map(str, words)]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "true" if threads else "false"}
    started = time.perf_counter()
    launcher = [sys.executable, "-c", LAUNCHER, *command]
    told = subprocess.run(launcher, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    status, cpu_seconds, peak_kib = map(float, told.split())
    if status:
        raise subprocess.CalledProcessError(int(status), command)
    return Usage(time.perf_counter() - started, cpu_seconds, peak_kib / 1024)


def measure_rows(file: Path, folder: Path) -> Usage:
    """`validate` without a tokenizer."""
    return measure("dfactory.cli", "data", "validate", file)


def measure_validate(file: Path, folder: Path) -> Usage:
    return measure("dfactory.cli", "data", "validate", file, "--model", "tiny", "--max-length", 2048)


def measure_start(file: Path, folder: Path) -> Usage:
    """From the command line to the end of one optimiser step."""
    keys = {"datasets": f"[{{path: {file}}}]", "eval_datasets": "[]", "streaming": "true", "max_steps": 1}
    keys |= {"max_length": 2048, "row_length": 6144, "overlong": "truncate", "output_dir": folder / "run"}
    return measure(
        "dfactory.cli", "train", RECIPE, *(f"{name}={value}" for name, value in keys.items()), "warmup_steps=0"
    )


PARTS = {"start": measure_start, "rows": measure_rows, "validate": measure_validate}


def reader_rate(count: int) -> tuple[float, float]:
    """Records a minute of processor time, and their mean length in tokens."""
    vocabulary = read_vocabulary("tiny", mask_token_id=None, eos_token_id=None)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rate.jsonl"
        write_records(file, count, size=110 + 6 * RATE_TOKENS)
        started = time.process_time()
        examples = load_examples(
            [DatasetKeys(str(file))],
            vocabulary.encoder,
            max_length=2048,
            overlong="refuse",
            on_bad_row="error",
            max_bad_fraction=0.0,
            block_size=32,
            eos_id=vocabulary.special.eos,
            vocab_size=vocabulary.size,
            mask_id=vocabulary.special.mask,
        )
        for example in examples:
            align(example, 32, vocabulary.special.eos)
        seconds = time.process_time() - started
    return 60 * count / seconds, examples.report.tokens / count


@contextlib.contextmanager
def large_file(options: argparse.Namespace) -> Iterator[Path]:
    """An existing file of --keep, or a new one."""
    with tempfile.TemporaryDirectory() as folder:
        file = options.keep or Path(folder) / "large.jsonl"
        if not file.exists():
            write_records(file, options.records, options.bytes)
        yield file


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--bytes", type=int, default=2000, help="of a record, about")
    parser.add_argument("--keep", type=Path, help="where the large file is, or is to be kept")
    parser.add_argument("--parts", nargs="+", default=["rate", *PARTS], choices=["rate", *PARTS])
    parser.add_argument("--smoke", action="store_true", help="small sizes, to see that it runs")
    options = parser.parse_args(words)
    if options.smoke:
        options.records = 300
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # of this process: rates are those of one core

    console, within = Console(width=130), True
    table = Table("what", "records", "seconds", "cpu seconds", "peak MiB", "records a minute and core", "bar")
    if "rate" in options.parts:
        count = 200 if options.smoke else 20_000
        rate, tokens = reader_rate(count)
        table.add_row(
            f"reader, {tokens:.0f} tokens a record", f"{count:,}", "", "", "", f"{rate:,.0f}", f"{RATE_BAR:,}"
        )
        within &= options.smoke or rate >= RATE_BAR
    with large_file(options) as file, tempfile.TemporaryDirectory() as folder:
        size = f"{file.stat().st_size / 1e9:.2f} GB"
        for part in [part for part in PARTS if part in options.parts]:
            usage = PARTS[part](file, Path(folder))
            console.print(f"{part}: {usage.seconds:,.0f} s, {usage.peak_mib:,.0f} MiB", style="dim")
            rate = "" if part == "start" else f"{60 * options.records / usage.cpu_seconds:,.0f}"
            numbers = f"{usage.seconds:,.0f}", f"{usage.cpu_seconds:,.0f}", f"{usage.peak_mib:,.0f}"
            table.add_row(f"{part}, {size}", f"{options.records:,}", *numbers, rate, f"{MEMORY_BAR_MIB:,} MiB")
            within &= usage.peak_mib <= MEMORY_BAR_MIB
    console.print(table)
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
