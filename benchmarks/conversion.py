"""What a conversion buys: an autoregressive model turned into block diffusion, by block size, shift, LoRA, rate and length.

    dfactory bench conversion recipes/smollm2/cpt.yaml --data heldout.jsonl --output runs/conversion --ar scores.jsonl

Every arm is the recipe with some keys changed, trained by `dfactory train`; all but one of its choices are those of `base`.
An arm ends when it has seen the records of `--positions` response tokens. That is how `dfactory bench ar train` counts, so
arms and yardstick learn from equally many. Complementary views predict each of these tokens once, a single view about half
of them; the table has predicted tokens and CPU time too. Block sizes grow: 1, 4, 8, ... up to the arm's, in equal shares of
the run's first half.

The ELBO of the held-out records per response token (`dfactory eval --elbo-pairs`) is measured at evenly spaced
checkpoints, whose weights are removed then, but for the last. `--ar` takes the output of `dfactory bench ar score` on the
same records: its line, and each arm's gap to it. Both count the same response tokens; the ELBO also pays for the EOS fill.

`--cpu-seconds` stops an arm in good order where it has used as much: it saves, is measured, and is marked. A run that was
interrupted goes on from its checkpoint; one that is complete is not repeated, and one of other settings is refused.
Output: results.jsonl (one line a checkpoint), results.md, curves.png.
"""

import argparse
import dataclasses
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.ar_scores import check_counts, per_token, read_lines
from dfactory.assembly import Inputs, make_source, read_inputs
from dfactory.console import plain_console
from dfactory.engine.preemption import EXIT_PREEMPTED
from dfactory.errors import DFactoryError
from dfactory.packing import align
from dfactory.recipe import Recipe, load_recipe
from dfactory.runs.folder import RunFolder

RESULT, RUN, USED = "result.json", "run", "cpu_seconds.jsonl"
SIZES = (1, 4, 8, 16, 32)  # of a schedule, up to the arm's own
GROWING = 0.5  # share of a run in which blocks grow
NOISE = 0.1  # standard deviation of the noise on mask embeddings, in the arm that has it
NOISE_SHARE = 0.1  # of the run
POLL = 1.0  # seconds between two looks at a run


class Arm(NamedTuple):
    """What differs from the base."""

    keys: Sequence[str] = ()
    block_size: int | None = None
    scheduled: bool = True
    rate: float = 1.0  # times the recipe's learning rate
    length: float = 1.0  # times --positions
    noise: bool = False  # on mask embeddings


ARMS = {
    "base": Arm(),
    **{f"block-{size}": Arm(block_size=size) for size in SIZES},
    "at-once": Arm(scheduled=False),
    "shift": Arm(["logit_shift=1"]),
    "shift-at-once": Arm(["logit_shift=1"], scheduled=False),
    "lora": Arm(["use_peft=true"], rate=5.0),
    "rate-third": Arm(rate=1 / 3),
    "rate-triple": Arm(rate=3.0),
    "single": Arm(["complementary=false"]),
    "noise": Arm(noise=True),
    "short": Arm(length=0.3),
    "long": Arm(length=3.0),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """An arm's run in numbers."""

    keys: list[str]  # of `dfactory train`, seed and folder aside
    positions: list[int]  # response tokens of the records seen, after each step

    @property
    def steps(self) -> int:
        return len(self.positions)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    console = plain_console()
    try:
        plans, options.scored = make_plans(options), held_out(options)
        runs = [(arm, seed) for seed in options.seeds for arm in options.arms]
        with ThreadPoolExecutor(options.jobs) as pool:
            started = [pool.submit(measure, arm, seed, plans[arm], options, console) for arm, seed in runs]
            results = [run.result() for run in started]
        report(results, options, console)
    except DFactoryError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_status
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="of `stage: cpt` on an autoregressive model: every arm's keys")
    parser.add_argument("--data", type=Path, required=True, help="held-out records")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs and results")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--positions", type=int, default=1_000_000, help="response tokens (default: %(default)s)")
    parser.add_argument("--block-size", type=int, default=8, help="of the base (default: %(default)s)")
    parser.add_argument("--checkpoints", type=int, default=3, help="that are measured (default: %(default)s)")
    parser.add_argument("--elbo-pairs", type=int, default=2, help="of views a record (default: %(default)s)")
    parser.add_argument("--held-out", type=int, help="the first records of --data alone")
    parser.add_argument(
        "--ar", type=Path, help="what `dfactory bench ar score --output FILE` wrote of the same records"
    )
    parser.add_argument("--cpu-seconds", type=float, default=math.inf, help="of training an arm, at most")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    parser.epilog = "Further words are recipe keys of all arms, such as learning_rate=1e-4."
    options, options.overrides = parser.parse_known_args(arguments)
    if wrong := [word for word in options.overrides if "=" not in word or word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    return options


# --- plans -------------------------------------------------------------------------------------------------------------


def make_plans(options: argparse.Namespace) -> dict[str, Plan]:
    """Of all arms, with the records read once."""
    recipe = load_recipe(options.recipe, [*options.overrides, "block_size_schedule=null", "eval_datasets=[]"])
    inputs = read_inputs(recipe)
    return {name: plan_of(ARMS[name], recipe, inputs, options) for name in options.arms}


def plan_of(arm: Arm, recipe: Recipe, inputs: Inputs, options: argparse.Namespace) -> Plan:
    """Steps follow from the positions, and the schedule from the steps: counted without it first."""
    positions, size = round(options.positions * arm.length), arm.block_size or options.block_size
    keys = [*options.overrides, "eval_datasets=[]", *arm.keys, f"block_size={size}"]
    keys.append(f"learning_rate={recipe.learning_rate * arm.rate:g}")
    plain = load_recipe(options.recipe, [*keys, "block_size_schedule=null"])
    steps = len(count(plain, inputs, positions))
    phases = schedule(size, steps) if arm.scheduled else None
    seen = count(dataclasses.replace(plain, block_size_schedule=phases), inputs, positions)
    noise, noise_steps = (NOISE, math.ceil(NOISE_SHARE * len(seen))) if arm.noise else (0, 0)
    keys += [f"block_size_schedule={phases or 'null'}"]
    keys += [f"mask_embedding_noise={noise}", f"mask_embedding_noise_steps={noise_steps}"]
    every = math.ceil(len(seen) / options.checkpoints)
    return Plan([*keys, f"max_steps={len(seen)}", f"save_steps={every}", "save_total_limit=null"], seen)


def schedule(size: int, steps: int) -> list[list[int]] | None:
    """The smaller sizes in equal shares of the run's first half; None where a size would get no step."""
    sizes = [smaller for smaller in SIZES if smaller < size]
    share = int(GROWING * steps / max(len(sizes), 1))
    if not sizes or share == 0:
        return None
    return [*([number * share, smaller] for number, smaller in enumerate(sizes)), [len(sizes) * share, size]]


def count(recipe: Recipe, inputs: Inputs, positions: int) -> list[int]:
    """After each step, the response tokens of the records that the run has seen, up to `positions`."""
    source, lengths, seen = make_source(recipe, inputs, rank=0, world_size=1), {}, [0]
    while seen[-1] < positions and (units := source.next_units()) is not None:
        for unit in units:
            if unit not in lengths:
                lengths[unit] = int(align(inputs.train[unit], 1, inputs.special.eos).real_T.sum())
        seen.append(seen[-1] + sum(lengths[unit] for unit in units))
    return seen[1:]


# --- runs --------------------------------------------------------------------------------------------------------------


def measure(arm: str, seed: int, plan: Plan, options: argparse.Namespace, console) -> dict[str, Any]:
    """Train an arm and measure its checkpoints, or read what an earlier call found."""
    folder, settings = options.output / f"{arm}-{seed}", settings_of(plan, options)
    file = folder / RESULT
    if file.is_file():
        found = json.loads(file.read_text())
        if found["settings"] != settings:
            raise SystemExit(
                f"{folder} was measured with {found['settings']}, and this is {settings}: take another --output"
            )
        return found
    folder.mkdir(parents=True, exist_ok=True)
    console.print(f"{arm}, seed {seed}: {plan.steps} steps, {plan.positions[-1]:,} response tokens", soft_wrap=True)
    complete = train(folder, seed, plan, options)
    curve = [point(folder, step, plan, options) for step in saved_steps(folder)]
    metrics = [row for row in RunFolder(folder / RUN).metrics() if "tokens" in row]
    found = {
        "arm": arm,
        "seed": seed,
        "settings": settings,
        "complete": complete,
        "predicted": sum(row["targets"] for row in metrics),
        "cpu_seconds": used(folder),
        "curve": curve,
    }
    for checkpoint in checkpoints(folder)[:-1]:
        shutil.rmtree(checkpoint)
    file.write_text(json.dumps(found) + "\n")
    console.print(f"{arm}, seed {seed}: {curve[-1]['elbo']:.4f} nats per token", soft_wrap=True)
    return found


def settings_of(plan: Plan, options: argparse.Namespace) -> dict[str, Any]:
    """What an arm's numbers depend on."""
    names = ("elbo_pairs", "held_out", "cpu_seconds")
    named = {name: getattr(options, name) for name in names if getattr(options, name) != math.inf}
    return named | {"recipe": str(options.recipe), "data": str(options.data), "keys": plan.keys}


def train(folder: Path, seed: int, plan: Plan, options: argparse.Namespace) -> bool:
    """Train to the end, or until the CPU time is used. Returns whether it came to the end."""
    left = options.cpu_seconds - used(folder)
    if left <= 0 or saved_steps(folder)[-1:] == [plan.steps]:
        return saved_steps(folder)[-1:] == [plan.steps]
    start = "resume_from_checkpoint" if (folder / RUN / "LATEST").is_file() else "overwrite_output_dir"
    keys = [*plan.keys, f"seed={seed}", f"output_dir={folder / RUN}", f"{start}=true"]
    with (folder / "train.log").open("a") as log:
        process = start_dfactory(["train", options.recipe, *keys], log, options)
        try:
            seconds = watch(process, left)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    with (folder / USED).open("a") as file:
        file.write(f"{seconds}\n")
    if process.returncode not in (0, EXIT_PREEMPTED):
        raise SystemExit(f"{folder.name} ended with status {process.returncode}: see {folder / 'train.log'}")
    return process.returncode == 0


def start_dfactory(words: list[Any], log, options: argparse.Namespace) -> subprocess.Popen:
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if options.jobs > 1 else {})
    command = [sys.executable, "-m", "dfactory.cli", *map(str, words)]
    return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def watch(process: subprocess.Popen, limit: float) -> float:
    """The CPU time that a run took, in seconds. Above the limit it is asked to save and end."""
    seconds, asked, seen = 0.0, False, psutil.Process(process.pid)
    while process.poll() is None:
        try:
            seconds = cpu_seconds(seen)
        except psutil.NoSuchProcess:
            break
        if seconds > limit and not asked:
            process.send_signal(signal.SIGTERM)
            asked = True
        time.sleep(POLL)
    process.wait()
    return seconds


def cpu_seconds(process: psutil.Process) -> float:
    """Of the process and its children."""
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def used(folder: Path) -> float:
    """CPU seconds of all calls that trained this arm."""
    file = folder / USED
    return sum(map(float, file.read_text().split())) if file.is_file() else 0.0


def checkpoints(folder: Path) -> list[Path]:
    """The run's, the oldest first."""
    return sorted((folder / RUN).glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def saved_steps(folder: Path) -> list[int]:
    return [int(path.name.rpartition("-")[2]) for path in checkpoints(folder)]


def point(folder: Path, step: int, plan: Plan, options: argparse.Namespace) -> dict[str, float]:
    """A checkpoint's place on the curve."""
    output = folder / f"elbo-{step}.jsonl"
    if not output.is_file():
        words = ["eval", "--model", folder / RUN / f"checkpoint-{step}", "--data", options.scored]
        with (folder / "eval.log").open("a") as log:
            status = start_dfactory(
                [*words, "--elbo-pairs", options.elbo_pairs, "--output", output], log, options
            ).wait()
        if status:
            raise SystemExit(f"{folder.name}: eval ended with status {status}: see {folder / 'eval.log'}")
    lines = read_lines(output)
    if options.ar:
        check_counts(read_lines(options.ar)[: len(lines)], lines, output)
    return {"step": step, "positions": plan.positions[step - 1], "elbo": per_token(lines, "elbo")}


def held_out(options: argparse.Namespace) -> Path:
    """The file of records that is scored: --data, or its beginning."""
    if options.held_out is None:
        return options.data
    file = options.output / "heldout.jsonl"
    options.output.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(options.data.read_text().splitlines(keepends=True)[: options.held_out]))
    return file


# --- what is shown -----------------------------------------------------------------------------------------------------


def report(results: list[dict[str, Any]], options: argparse.Namespace, console) -> None:
    """Write the lines, the table and the figure."""
    lines = [
        {name: found[name] for name in ("arm", "seed", "complete")} | point
        for found in results
        for point in found["curve"]
    ]
    (options.output / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    exact = per_token(read_lines(options.ar)[: options.held_out], "logprob") if options.ar else None
    page = table(results, options.arms, exact)
    (options.output / "results.md").write_text(page)
    draw(results, options.arms, exact, options.output / "curves.png")
    console.print(page, soft_wrap=True)
    console.print(f"written: {options.output / 'results.md'}, results.jsonl, curves.png", soft_wrap=True)


def table(results: list[dict[str, Any]], arms: Sequence[str], exact: float | None) -> str:
    """Markdown: an arm a row, means over its seeds and the ELBO's standard deviation."""
    rows = [
        "| arm | seeds | response tokens | predicted | CPU s | ELBO, nats per token | gap to AR |",
        "|---|" + "---:|" * 6,
    ]
    for arm in arms:
        of_arm = [found for found in results if found["arm"] == arm]
        elbos = [found["curve"][-1]["elbo"] for found in of_arm]
        spread = f" ± {statistics.stdev(elbos):.3f}" if len(elbos) > 1 else ""
        gap = "" if exact is None else f"{exact - statistics.fmean(elbos):.3f}"
        numbers = [[f["curve"][-1]["positions"], f["predicted"], f["cpu_seconds"]] for f in of_arm]
        means = [f"{statistics.fmean(column):,.0f}" for column in zip(*numbers, strict=True)]
        name = arm if all(found["complete"] for found in of_arm) else f"{arm} (stopped)"
        cells = [name, str(len(of_arm)), *means, f"{statistics.fmean(elbos):.3f}{spread}", gap]
        rows.append(f"| {' | '.join(cells)} |")
    if exact is not None:
        rows.append(f"| autoregressive, exact | | | | | {exact:.3f} | 0 |")
    return "\n".join(rows) + "\n"


def draw(results: list[dict[str, Any]], arms: Sequence[str], exact: float | None, file: Path) -> None:
    """ELBO over response tokens: a line an arm, the mean over seeds."""
    from matplotlib.figure import Figure  # slow to import, and a run is long

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="response tokens", ylabel="ELBO, nats per token")
    for arm in arms:
        curves = [found["curve"] for found in results if found["arm"] == arm]
        points = [
            (statistics.fmean(p["positions"] for p in at), statistics.fmean(p["elbo"] for p in at))
            for at in zip(*curves, strict=False)
        ]
        axes.plot(*zip(*points, strict=True), marker="o", label=arm)
    if exact is not None:
        axes.axhline(exact, color="black", linestyle="--", label="autoregressive, exact")
    axes.legend(fontsize="small", ncols=2)
    axes.grid(alpha=0.3)
    figure.savefig(file)


if __name__ == "__main__":
    sys.exit(main())
