"""What an autoregressive start is worth: block diffusion converted from it, and trained from random weights.

    python -m benchmarks.cpt --output runs/benchmark_cpt

makes the autoregressive model of data_tools.make_ar_model, trains by recipes/quickstart/cpt.yaml

    schedule   from it, with the recipe's schedule of block sizes
    at once    from it, with the last block size from the first step on
    scratch    the same architecture from random weights, with the last block size

each for the recipe's steps, so on equal row positions, and prints the ELBO of held-out texts in nats per token
(`dfactory eval --elbo-pairs`), mean and standard deviation over seeds. A run that is there already is not repeated.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_tools import make_ar_model
from dfactory.runs.folder import RunFolder

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart" / "cpt.yaml"
PAIRS = 4  # of views a document
NO_SCHEDULE = ["block_size_schedule=null"]
ARMS = {
    "schedule": [],
    "at once": NO_SCHEDULE,
    "scratch": [*NO_SCHEDULE, "init_weights=random", "mask_embedding_noise=0", "mask_embedding_noise_steps=0"],
}


def run(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "dfactory.cli", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def train(start: Path, folder: Path, overrides: list[str]) -> None:
    if (folder / "LATEST").is_file():
        return
    data = [f"{name}=[{{path: {start / file}}}]" for name, file in FILES.items()]
    run("train", RECIPE, f"model_name_or_path={start / 'model'}", *data, f"output_dir={folder}", *overrides)


FILES = {"datasets": "train.jsonl", "eval_datasets": "heldout.jsonl"}


def elbo_per_token(model: Path, held_out: Path, block_size: int | None = None) -> float:
    """In nats. `block_size` null is what the model was trained with."""
    output = model / f"elbo-{block_size or 'own'}.jsonl"
    if not output.is_file():
        size = [f"decode.block_size={block_size}"] if block_size else []
        run("eval", "--model", model, "--data", held_out, "--elbo-pairs", PAIRS, "--output", output, *size)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    return sum(row["elbo"] for row in rows) / sum(row["tokens"] for row in rows)


def measure(start: Path, folder: Path, overrides: list[str]) -> dict[str, float]:
    train(start, folder, overrides)
    metrics = RunFolder(folder).metrics()
    return {
        "ELBO": elbo_per_token(folder, start / FILES["eval_datasets"]),
        "block 1": elbo_per_token(folder, start / FILES["eval_datasets"], 1),
        "eval loss": metrics[-1]["eval/loss"],
        "positions": sum(row.get("tokens", 0) for row in metrics),
        "seconds": sum(row.get("seconds", 0) for row in metrics),
    }


def show(values: list[float], digits: int = 3) -> str:
    spread = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys for every run")
    options = parser.parse_args(arguments)

    started, start = time.perf_counter(), options.output / "ar"
    if not (start / "model").is_dir():
        make_ar_model.main(["--output", str(start)])
    table = Table("", "seeds", "ELBO, nats/token", "at block size 1", "eval loss", "row positions", "seconds")
    for column in table.columns[1:]:
        column.justify = "right"
    for arm in options.arms:
        folders = {seed: options.output / f"{arm.replace(' ', '_')}-{seed}" for seed in options.seeds}
        keys = [*ARMS[arm], *options.overrides]
        results = [measure(start, folder, [*keys, f"seed={seed}"]) for seed, folder in folders.items()]
        columns = {name: [result[name] for result in results] for name in results[0]}
        table.add_row(
            arm,
            ", ".join(map(str, options.seeds)),
            show(columns["ELBO"]),
            show(columns["block 1"]),
            show(columns["eval loss"]),
            f"{statistics.mean(columns['positions']):,.0f}",
            show(columns["seconds"], 0),
        )
    table.caption = f"{time.perf_counter() - started:.0f} s altogether"
    Console(highlight=False).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
