"""Runs recipes one after another on one local Ray cluster of four cores: `worker.py jobs.json`."""

import json
import sys
from pathlib import Path

import ray

from dfactory.recipe import load_recipe
from dfactory.train import train


def main() -> None:
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="error")
    for job in json.loads(Path(sys.argv[1]).read_text()):
        status = train(load_recipe(job["recipe"], job["overrides"]))
        assert status == 0, f"{job} ended with {status}"


if __name__ == "__main__":
    main()
