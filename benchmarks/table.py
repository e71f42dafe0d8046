"""The whole table of speed: the opponent, another checkout, and this tree, row by row.

    python -m benchmarks.table --list                        # the rows and their commands
    python -m benchmarks.table --main ../dFactory            # all of them
    python -m benchmarks.table --rows step-small decoding    # those whose names begin so

A row is a command of benchmarks.step, packing, decoding or rl in a process of its own, whose sides take turns; medians of
five. What was measured goes to OUTPUT/ROW.json as soon as a row ends. A row that is there is not measured again, so that a
table can be made in several sittings; `--again` measures it again. A row whose models do not fit into the free memory is
left out by name. The table is printed and written to OUTPUT/table.md. Ends with status 1 if a row failed, or computed
something else than the opponent.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from benchmarks.workload import write_config
from dfactory.models.families.base import FAMILIES
from dfactory.models.registry import read_config

ROOT = Path(__file__).resolve().parents[1]
STATE_BYTES = 16  # a parameter: fp32 weight, gradient and AdamW's two moments
OURS = ("fp32", "packed", "cached", "this")  # what a benchmark calls this tree's side
LARGE = 157184  # LLaDA2's vocabulary


class Row(NamedTuple):
    benchmark: str
    words: str
    shape: str = "small"
    vocabulary: int = 8192
    trains: bool = True

    def command(self, main: Path | None, file: Path, rounds: int | None) -> list[str]:
        sizes = ["--shape", self.shape, "--vocabulary", str(self.vocabulary)]
        sizes = sizes[2:] if self.benchmark == "packing" else sizes
        words = [*self.words.split(), *sizes, "--json", str(file), *(["--main", str(main)] if main else [])]
        number = {"step": "--steps", "packing": "--batches", "decoding": "--rounds", "rl": "--updates"}[self.benchmark]
        words += [number, str(rounds)] if rounds else []
        return [sys.executable, "-m", f"benchmarks.{self.benchmark}", *words]

    def needed_bytes(self, sides: int) -> int:
        """Of all sides' models, without activations."""
        with tempfile.TemporaryDirectory() as folder:
            config = read_config(write_config(Path(folder), self.vocabulary, self.shape))
        with torch.device("meta"):
            model = FAMILIES.variant_of(config).model_class(config)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return sides * parameters * (STATE_BYTES if self.trains else 4)


def steps(name: str, sizes: str, shape: str = "small", vocabulary: int = 8192) -> dict[str, Row]:
    """With one view and with a pair."""
    words = {views: f"--fp32 --views {views} {sizes}" for views in (1, 2)}
    return {f"step-{name}-{views}view": Row("step", words[views], shape, vocabulary) for views in (1, 2)}


def decodings(name: str, words: str, shape: str = "small", vocabulary: int = 8192) -> dict[str, Row]:
    """One prompt, and ragged ones."""
    kinds = {"one": 0, "ragged": 1}
    return {
        f"decoding-{name}-{kind}": Row("decoding", f"--only {n} {words}", shape, vocabulary, trains=False)
        for kind, n in kinds.items()
    }


ROWS = {
    **steps("small-1k", "--length 1024 --batch 4"),
    **steps("small-2k", "--length 2048 --batch 2"),
    **steps("small-4k", "--length 4096 --batch 1"),
    **steps("small-8k", "--length 8192 --batch 1"),
    **steps("small-v157k", "--length 512 --batch 2", vocabulary=LARGE),
    **steps("mini32-1k", "--length 1024 --batch 1", "mini32"),
    **steps("mini32-v157k", "--length 1024 --batch 1", "mini32", LARGE),
    **steps("mini-1k", "--length 1024 --batch 1", "mini"),
    **steps("mini-v157k", "--length 1024 --batch 2", "mini", LARGE),
    **steps("qwen3-1k", "--length 1024 --batch 1", "qwen3-1.7b"),
    **steps("qwen3-v157k", "--length 1024 --batch 1", "qwen3-1.7b", LARGE),
    **steps("smollm2-1k", "--length 1024 --batch 1", "smollm2", 49152),
    "packing": Row("packing", ""),
    **decodings("small", ""),
    **decodings("mini32", "--new-tokens 128 --prompts 16", "mini32"),
    **decodings("qwen3-1.7b", "--new-tokens 128 --prompts 16", "qwen3-1.7b"),
    **decodings("smollm2", "--new-tokens 128 --prompts 16", "smollm2", 49152),
    "rl-traces": Row("rl", "--prompts 1 --traces"),
    "rl-elbo": Row("rl", "--prompts 1"),
}


def measure(name: str, row: Row, options: argparse.Namespace) -> str | None:
    """Why there is no result, or None."""
    needed, free = row.needed_bytes(3 if options.main else 2), psutil.virtual_memory().available
    if not torch.cuda.is_available() and needed > free:
        return f"left out: its models need {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free"
    file = options.output / f"{name}.json"
    command = row.command(options.main and options.main.resolve(), file.resolve(), options.rounds)
    print(f"==> {name}: {shlex.join(command)}", flush=True)
    done = subprocess.run(command, cwd=ROOT, check=False)
    return None if file.is_file() else f"ended with status {done.returncode}"


def cells(found: dict[str, Any]) -> list[str]:
    """The columns after the name, of what a benchmark wrote of one row."""
    sides = found["sides"]
    (this,) = (name for name in OURS if name in sides)
    cpu = {name: statistics.median(side["cpu_s"]) for name, side in sides.items()}
    wall = {name: statistics.median(side["wall_s"]) for name, side in sides.items()}

    def ratio(name: str) -> str:
        if name not in sides:
            return ""
        return f"{cpu[name]:.2f} s, {cpu['opponent'] / cpu[name]:.2f} ({wall['opponent'] / wall[name]:.2f})"

    def memory(name: str) -> str:
        return f"{sides[name]['memory']['above_parameters'] / 2**20:,.0f}" if "memory" in sides.get(name, {}) else ""

    memories = ", ".join(filter(None, (memory(name) for name in ("opponent", "main", this))))
    equal = f"{'yes' if found['equal'] else 'NO'}, {max(found['differences'].values()):.0e}"
    return [found["label"], f"{cpu['opponent']:.2f} s", ratio("main"), ratio(this), memories, equal]


def page(output: Path, rows: dict[str, Row], problems: dict[str, str]) -> str:
    """In Markdown. CPU seconds; a ratio is opponent / this by CPU time, in brackets by the clock."""
    columns = ["row", "what", "opponent", "main", "this tree", "MiB above parameters: opponent, (main,) this", "equal"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name in rows:
        file = output / f"{name}.json"
        if not file.is_file():
            lines.append(f"| {name} | {problems.get(name, 'not measured')} |" + " |" * (len(columns) - 2))
            continue
        for found in json.loads(file.read_text())["rows"]:
            lines.append("| " + " | ".join([name, *cells(found)]) + " |")
    return "\n".join(lines) + "\n"


def all_equal(output: Path, rows: dict[str, Row]) -> bool:
    files = [output / f"{name}.json" for name in rows]
    return all(found["equal"] for file in files if file.is_file() for found in json.loads(file.read_text())["rows"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="rows whose names begin so (default: all)")
    parser.add_argument("--main", type=Path, metavar="CHECKOUT", help="another checkout, as a column of its own")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark_table"), help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, help="that are timed (default: each benchmark's, five)")
    parser.add_argument("--again", action="store_true", help="measure rows again that are there")
    parser.add_argument("--list", action="store_true", help="print the rows and their commands")
    options = parser.parse_args(arguments)
    rows = {n: row for n, row in ROWS.items() if any(n.startswith(start) for start in options.rows or ("",))}
    if not rows:
        parser.error(f"--rows {' '.join(options.rows)}: the rows are {', '.join(ROWS)}")
    if options.list:
        for name, row in rows.items():
            command = shlex.join(row.command(options.main, options.output / f"{name}.json", options.rounds)[1:])
            print(f"{name}: python {command}")
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    problems: dict[str, str] = {}
    for name, row in rows.items():
        if options.again or not (options.output / f"{name}.json").is_file():
            (options.output / f"{name}.json").unlink(missing_ok=True)
            if problem := measure(name, row, options):
                problems[name] = problem
    shown = page(options.output, rows, problems)
    (options.output / "table.md").write_text(shown)
    print(shown)
    failed = any("status" in problem for problem in problems.values())
    return 0 if not failed and all_equal(options.output, rows) else 1


if __name__ == "__main__":
    sys.exit(main())
