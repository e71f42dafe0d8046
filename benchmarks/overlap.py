"""What asynchronous rollouts hide: the same reinforcement learning with `max_staleness` 0 and 1, one after the other.

    python -m benchmarks.overlap

Both are real runs, `dfactory train` on a Ray of their own with one learner and one rollout actor, each with one thread: the
tiny model, prompts of the quickstart, and a reward by chance, so that every group has a signal. The time of a step is that
between two lines of metrics.jsonl. Synchronous, it is the sum of decoding and training; asynchronous, one runs while the
other does, and the most that can be hidden is the shorter of the two. It takes two cores with nothing else running.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "quickstart" / "rl.yaml"
WARM_UP = 3  # steps
POLL_S = 0.01
REWARD = """
import random

def chance(completions, **columns):
    return [random.random() for _ in completions]
"""
BAR = 0.65


def run(folder: Path, staleness: int, options: argparse.Namespace) -> tuple[list[float], list[dict]]:
    """Seconds between the lines of metrics.jsonl after the first steps, and these lines."""
    (folder / "reward.py").write_text(REWARD)
    output = folder / f"staleness-{staleness}"
    keys = [
        *("model_name_or_path=tiny", f"reward_funcs=[{folder}/reward.py:chance]", f"max_staleness={staleness}"),
        *("policy_loss=ebpo", f"num_views={options.views}", f"num_generations={options.generations}"),
        *(f"prompts_per_step={options.prompts}", f"decode.max_new_tokens={options.new_tokens}"),
        *("eval_datasets=[]", "eval_decode_prompts=0", "save_steps=null", "row_length=null", "max_length=512"),
        *(f"max_steps={WARM_UP + options.steps}", f"output_dir={output}"),
    ]
    command = [sys.executable, "-m", "dfactory.cli", "train", str(RECIPE), *keys]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        times: list[float] = []
        while process.poll() is None:
            time.sleep(POLL_S)
            lines = _lines(output / "metrics.jsonl")
            times += [time.perf_counter()] * (len(lines) - len(times))
    lines = _lines(output / "metrics.jsonl")
    times += [time.perf_counter()] * (len(lines) - len(times))  # what came between the last look and the end
    if process.returncode != 0:
        raise SystemExit(
            f"{' '.join(command)} ended with {process.returncode}:\n{(folder / 'log').read_text()[-2000:]}"
        )
    rows = [json.loads(line) for line in lines][WARM_UP:]
    return [later - earlier for earlier, later in itertools.pairwise(times)][WARM_UP - 1 :], rows


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.is_file() else []


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = {"steps": 12, "prompts": 8, "generations": 8, "new-tokens": 64, "views": 1, "rounds": 2}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="sizes for tests")
    options = parser.parse_args(arguments)
    if options.smoke:
        vars(options).update(steps=2, prompts=2, generations=2, new_tokens=16, rounds=1)

    seconds: dict[int, list[float]] = {0: [], 1: []}
    rows: dict[int, list[dict]] = {0: [], 1: []}
    for _ in range(options.rounds):
        for staleness in seconds:
            with tempfile.TemporaryDirectory() as folder:
                found = run(Path(folder), staleness, options)
            seconds[staleness] += found[0]
            rows[staleness] += found[1]

    table = Table("max_staleness", "s a step (range)", "decoding", "training", "waited for rollouts", "staleness")
    wall = {staleness: statistics.median(values) for staleness, values in seconds.items()}
    for staleness, values in seconds.items():
        told = (
            statistics.median(row[name] for row in rows[staleness])
            for name in ("seconds/rollout", "seconds", "seconds/rollout_wait", "staleness")
        )
        spread = f"{wall[staleness]:.2f} ({min(values):.2f} to {max(values):.2f})"
        table.add_row(str(staleness), spread, *(f"{value:.2f}" for value in told))
    table.title = (
        f"{options.prompts} groups of {options.generations} answers of up to {options.new_tokens} tokens a step"
    )
    table.caption = (
        f"asynchronous / synchronous {wall[1] / wall[0]:.2f} (bar {BAR}; 0.50 where both parts take as long)"
    )
    Console(width=110, highlight=False).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
