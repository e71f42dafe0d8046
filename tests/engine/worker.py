"""Runs recipes one after another in one process group: `torchrun ... worker.py jobs.json`.

Each job is a recipe with overrides, as `dfactory train` would get them; what a job left is in its output_dir.
"""

import json
import sys
from pathlib import Path

from dfactory.recipe import load_recipe
from dfactory.train import train


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        status = train(load_recipe(job["recipe"], job["overrides"]))
        assert status == 0, f"{job} ended with {status}"


if __name__ == "__main__":
    main()
