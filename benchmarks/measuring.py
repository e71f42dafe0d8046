"""How the benchmarks measure: sides that take turns, seconds of the clock and the processor, and a step's peak memory.

A side is a call that takes the number of the round. Sides of this tree run in this process; `Elsewhere` is a process of its
own, with this tree's benchmarks/ and the dfactory/ of another checkout: the difference that a change has made.
"""

import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import psutil
import torch

ROOT = Path(__file__).resolve().parents[1]
MEMORY_SAMPLES = 0.002  # seconds between two looks at the resident memory
GIVES_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "65536"
}  # glibc then returns what is freed, so that memory in use is what is used


class Steps(Protocol):
    """A side whose memory is measured."""

    parameters: list[torch.Tensor]

    def step(self, batch: Any, rows: Any) -> float: ...


class Memory(NamedTuple):
    """Bytes at the peak of a step: of the device's memory where there is one, else of the process."""

    above_parameters: int  # gradients, AdamW's moments and fp32 copies of bf16 weights included
    above_state: int  # above what stands between two steps


def measure_memory(make: Callable[[], Steps], batch: Any, rows: Any) -> Memory:
    """Of the second step: the first one makes the moments. Peaks are sampled, because the kernel's never falls again."""
    before = memory_in_use()
    side = make()
    parameters = sum(parameter.nbytes for parameter in side.parameters)
    side.step(batch, rows)
    gc.collect()
    state = memory_in_use()
    with PeakMemory() as stepping:
        side.step(batch, rows)
    return Memory(stepping.peak - before - parameters, stepping.peak - state)


def memory_in_use() -> int:
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


class PeakMemory:
    """The highest memory in use: what the device's allocator has counted, or the process's own, sampled in a thread."""

    def __init__(self, measure: Callable[[], int] = memory_in_use):
        self.measure = measure

    def __enter__(self) -> "PeakMemory":
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.peak, self.done = self.measure(), threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.done.set()
        self.thread.join()
        self.peak = max(self.peak, torch.cuda.max_memory_allocated() if torch.cuda.is_available() else self.measure())

    def _watch(self) -> None:
        while not self.done.wait(MEMORY_SAMPLES):
            self.peak = max(self.peak, self.measure())


class Turn(NamedTuple):
    """One round of one side."""

    result: Any
    seconds: float
    cpu: float  # seconds of the processor, of all threads


class Timed(NamedTuple):
    seconds: list[float]  # a round
    results: list  # what each round returned
    cpu: list[float]  # seconds of the processor a round

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def cpu_median(self) -> float:
        return statistics.median(self.cpu)


def timed_turn(call: Callable[[int], object], number: int) -> Turn:
    started, cpu = time.perf_counter(), time.process_time()
    result = call(number)
    return Turn(result, time.perf_counter() - started, time.process_time() - cpu)


def interleave(calls: dict[str, Callable[[int], object]], rounds: int, warmup: int = 1) -> dict[str, Timed]:
    """Call each side in turn with the number of the round. The results of warm-up rounds are kept, their times not."""
    timed = {name: Timed([], [], []) for name in calls}
    for number in range(warmup + rounds):
        for name, call in calls.items():
            turn = call.turn(number) if isinstance(call, Elsewhere) else timed_turn(call, number)
            timed[name].results.append(turn.result)
            if number >= warmup:
                timed[name].seconds.append(turn.seconds)
                timed[name].cpu.append(turn.cpu)
    return timed


def largest_difference(left: Sequence[float], right: Sequence[float]) -> float:
    """Relative, over two series of losses."""
    return max(abs(a - b) / abs(b) for a, b in zip(left, right, strict=True))


def row_of(
    label: str,
    timed: dict[str, Timed],
    equal: bool,
    differences: dict[str, float],
    memories: dict[str, Memory] | None = None,
    scales: dict[str, float] | None = None,
) -> dict[str, Any]:
    """One row of benchmarks/table.py. `scales`: by what the seconds of a side count, where it did a part of the work."""
    sides = {}
    for name, side in timed.items():
        scale = (scales or {}).get(name, 1.0)
        sides[name] = {"cpu_s": [scale * s for s in side.cpu], "wall_s": [scale * s for s in side.seconds]}
        if memories:
            sides[name]["memory"] = memories[name]._asdict()
    return {"label": label, "equal": equal, "differences": differences, "sides": sides}


def write_rows(file: Path | None, benchmark: str, rows: list[dict[str, Any]]) -> None:
    """What `--json` asks for."""
    if file is not None:
        file.write_text(
            json.dumps({"benchmark": benchmark, "threads": torch.get_num_threads(), "rows": rows}, indent=1)
        )


class Elsewhere:
    """A side in a process of its own: `side(spec)` of a benchmark's module, with the dfactory/ of a checkout."""

    def __init__(self, module: str, spec: dict[str, Any], checkout: Path = ROOT, more: dict[str, str] | None = None):
        """`more`: for its environment."""
        if not (checkout / "dfactory" / "train.py").is_file():
            raise FileNotFoundError(f"{checkout} is not a checkout of dFactory: it has no dfactory/train.py")
        self.folder = tempfile.TemporaryDirectory()
        root = Path(self.folder.name)
        for name, at in {"benchmarks": ROOT, "tests": ROOT, "dfactory": checkout, "recipes": checkout}.items():
            (root / name).symlink_to((at / name).resolve())
        environment = os.environ | (more or {}) | {"PYTHONPATH": str(root)}
        command = [sys.executable, "-m", "benchmarks.measuring", module, json.dumps(spec)]
        self.process = subprocess.Popen(
            command, cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Elsewhere":
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.folder.cleanup()

    def turn(self, number: int) -> Turn:
        return Turn(*self._ask(str(number)))

    def memory(self) -> Memory:
        return Memory(*self._ask("memory"))

    def _ask(self, word: str) -> list:
        print(word, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the other side's process ended with status {self.process.wait()} before its turn")
        return json.loads(answer)


def answer_turns(module: str, spec: dict[str, Any]) -> None:
    """What such a process does: a line on stdin is the number of a round or `memory`, one on stdout its outcome."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    benchmark, side = importlib.import_module(f"benchmarks.{module}"), None
    for line in sys.stdin:
        if line.strip() == "memory":
            outcome = benchmark.memory(spec)
        else:
            side = side or benchmark.side(spec)
            outcome = timed_turn(side, int(line))
        print(json.dumps(outcome), file=answers, flush=True)


if __name__ == "__main__":
    answer_turns(sys.argv[1], json.loads(sys.argv[2]))
