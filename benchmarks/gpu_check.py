"""What only a GPU can show, in one go: tests, training steps, decoding and a run, each with a time limit of its own.

    bash launch/gpu_check.sh                    # on a machine with one GPU, within eight minutes
    python -m benchmarks.gpu_check --dry-run    # the same parts at the sizes of tests, on any machine

A part is a command. Every one runs, whatever became of those before it, as long as `--minutes` last; one that does not end
in time is ended with all that it started. Results go to gpu_check.json and gpu_check.md in `--out`, after each part, so that
a check that is cut short has them too. Ends with status 1 if a part failed or did not run.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
LAST_LINES = 60  # of a part's output, on the page
FULL_OUTPUT = 200_000  # characters of it that the JSON file keeps
MATRIX, COPY_BYTES, REPEATS = 8192, 2**31, 10  # of the two rates that all others are compared with
MINUTES = 8.0
LEAST_S = 20  # no part begins with less left
GRACE_S = 5  # from an interrupt, at which pytest prints the failures so far, to the end


class Part(NamedTuple):
    """A command, at its size on a GPU and at that of a dry run."""

    name: str
    shows: str
    limit_s: int
    command: list[str]
    dry: list[str]


class Outcome(NamedTuple):
    part: Part
    status: int | None  # None: not ended in time
    seconds: float
    output: str
    limit_s: float  # the part's, or what was left of the whole check

    @property
    def is_passed(self) -> bool:
        return self.status == 0

    @property
    def verdict(self) -> str:
        if not self.is_begun:
            return "not run: the time of the check is used up"
        return {0: "passed", None: f"not ended after {self.limit_s:.0f} s"}.get(self.status, f"status {self.status}")

    @property
    def is_begun(self) -> bool:
        return self.limit_s > 0


def parts(scratch: Path) -> list[Part]:
    """All parts, cheap ones first."""
    tests = sorted(str(f.relative_to(ROOT)) for f in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in f.read_text())
    pytest = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-rsf", "--durations=8", "-m", "gpu", *tests]
    bench = [sys.executable, "-m"]
    step = [*bench, "benchmarks.step", "--no-memory"]
    decoding = [*bench, "benchmarks.decoding"]
    train = [sys.executable, "-m", "dfactory.cli", "train", "recipes/quickstart/sft.yaml", f"output_dir={scratch}/sft"]
    mini = ["--shape", "mini", "--vocabulary", "157184"]
    return [
        Part(
            "tests",
            "tests marked gpu: flex_attention, CUDA graphs, Liger, no host that waits; losses of twenty steps under ZeRO 0 "
            "and 3 and in bf16 against plain torch on a CPU",
            240,
            [*pytest, "--numprocesses", "8"],
            [*pytest, "--collect-only"],
        ),
        Part(
            "decoding, CUDA graphs",
            "replayed forwards beside launched ones, bf16, at mini's width",
            120,
            [*decoding, "--graphs", "--shape", "mini", "--new-tokens", "256", "--rounds", "2"],
            [*decoding, "--smoke"],
        ),
        Part(
            "step, SmolLM2",
            "the step of recipes/smollm2 on a model of its shape, all 30 layers, L 384, batch 32",
            90,
            [*step, "--shape", "smollm2", "--vocabulary", "49152", "--length", "384", "--batch", "32"],
            [*step, "--smoke"],
        ),
        Part(
            "step, mini's width",
            "two layers of LLaDA2-mini at their own size, 157,184 words, L 1024, batch 2",
            120,
            [*step, *mini, "--length", "1024", "--batch", "2"],
            [*step, "--smoke"],
        ),
        Part(
            "step, long rows",
            "the same at L 4096",
            120,
            [*step, *mini, "--length", "4096", "--batch", "1", "--steps", "2"],
            [*step, "--smoke"],
        ),
        Part(
            "shares of a step",
            "attention, experts, head, optimiser and engine at mini's width",
            90,
            [*bench, "benchmarks.step", "--profile", *mini, "--length", "1024", "--batch", "2"],
            [*bench, "benchmarks.step", "--profile", "--length", "64", "--batch", "2", "--vocabulary", "512"],
        ),
        Part(
            "decoding",
            "the decoder beside the opponent's cached loop",
            120,
            [*decoding, "--prompts", "8", "--rounds", "1", "--new-tokens", "128"],
            [*decoding, "--smoke"],
        ),
        Part("training", "the quickstart's SFT, whole", 120, train, [*train, "max_steps=2", "eval_decode_prompts=4"]),
    ]


def run_part(part: Part, dry_run: bool, left_s: float = float("inf"), show: Callable[[str], None] = print) -> Outcome:
    """Run the part's command in the repository's root, in a process group of its own, for `left_s` seconds at most."""
    if left_s < LEAST_S:
        return Outcome(part, None, 0.0, "", 0.0)
    command, limit_s = part.dry if dry_run else part.command, min(part.limit_s, left_s)
    show(f"==> {part.name}: {' '.join(command)}")
    started = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
        status = process.returncode
    except subprocess.TimeoutExpired:
        output, status = _end(process), None
    outcome = Outcome(part, status, time.perf_counter() - started, output[-FULL_OUTPUT:], limit_s)
    show("\n".join(output.splitlines()[-LAST_LINES:]))
    show(f"<== {part.name}: {outcome.verdict} in {outcome.seconds:.0f} s\n")
    return outcome


def _end(process: subprocess.Popen) -> str:
    """End a part and all that it started. Returns its output."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=GRACE_S)  # reads on, or a full pipe would hold the part up
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0]


def machine() -> dict[str, Any]:
    """The device, the versions, and the two rates of the device that results are read against."""
    facts = {"python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count()}
    for name in ("transformers", "deepspeed", "triton", "liger-kernel"):
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = None
    if not torch.cuda.is_available():
        return facts | {"gpu": None}
    return facts | {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} | device_rates()


def device_rates() -> dict[str, float]:
    """bf16 and fp32 matrix products, and copies (bytes read and written), of random data."""
    rates = {}
    for dtype in (torch.bfloat16, torch.float32):
        left = torch.randn(MATRIX, MATRIX, device="cuda", dtype=dtype)
        seconds = _seconds(lambda left=left: left @ left)
        rates[f"{dtype}".removeprefix("torch.") + " TFLOP/s"] = round(2 * MATRIX**3 / seconds / 1e12, 1)
    source = torch.randint(255, (COPY_BYTES,), device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    rates["copy TB/s"] = round(2 * COPY_BYTES / _seconds(lambda: target.copy_(source)) / 1e12, 2)
    return rates


def _seconds(work: Callable[[], Any]) -> float:
    """Mean of REPEATS calls, after three that are not timed."""
    for _ in range(3):
        work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPEATS):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / REPEATS


def write_results(folder: Path, facts: dict[str, Any], outcomes: list[Outcome], total_s: float) -> None:
    """gpu_check.json and gpu_check.md."""
    results = [
        {
            "name": outcome.part.name,
            "status": outcome.status,
            "seconds": round(outcome.seconds, 1),
            "command": outcome.part.command,
            "output": outcome.output,
        }
        for outcome in outcomes
    ]
    (folder / "gpu_check.json").write_text(json.dumps({"machine": facts, "parts": results}, indent=1) + "\n")
    (folder / "gpu_check.md").write_text(page(facts, outcomes, total_s))


def page(facts: dict[str, Any], outcomes: list[Outcome], total_s: float) -> str:
    lines = [
        "# GPU check",
        "",
        f"{total_s:.0f} s. " + ", ".join(f"{name} {value}" for name, value in facts.items()),
        "",
    ]
    lines += ["| part | what it shows | outcome | seconds |", "|---|---|---|---|"]
    for outcome in outcomes:
        lines.append(f"| {outcome.part.name} | {outcome.part.shows} | {outcome.verdict} | {outcome.seconds:.0f} |")
    for outcome in outcomes:
        shown = "\n".join(outcome.output.splitlines()[-LAST_LINES:])
        lines += ["", f"## {outcome.part.name}", "", "```", shown, "```"]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"), help="folder (default: %(default)s)")
    parser.add_argument(
        "--only", nargs="+", metavar="PART", help="these parts in this order, by the beginning of their names"
    )
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="for all parts together, a GPU's alone (default: %(default)g)"
    )
    parser.add_argument("--dry-run", action="store_true", help="at the sizes of tests; needs no GPU")
    options = parser.parse_args(arguments)
    if not (options.dry_run or torch.cuda.is_available()):
        parser.error("torch sees no CUDA device here: --dry-run runs the parts at the sizes of tests without one")
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = everything = parts(options.out.resolve())
    if options.only:
        chosen = [part for start in options.only for part in everything if part.name.startswith(start)]
    if not chosen:
        parser.error(f"--only {' '.join(options.only)}: the parts are {', '.join(part.name for part in everything)}")
    started, outcomes, facts = time.perf_counter(), [], machine()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    for part in chosen:
        left_s = float("inf") if options.dry_run else 60 * options.minutes - (time.perf_counter() - started)
        outcomes.append(run_part(part, options.dry_run, left_s))
        write_results(options.out, facts, outcomes, time.perf_counter() - started)
    print("\n".join(f"{outcome.part.name}: {outcome.verdict}, {outcome.seconds:.0f} s" for outcome in outcomes))
    print(f"{options.out}/gpu_check.md")
    return 0 if all(outcome.is_passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
