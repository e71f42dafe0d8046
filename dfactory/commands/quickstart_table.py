"""The results of the quickstart's stages beside what is expected.

Reads from each run folder `config.yaml` (its stage), `metrics.jsonl` (preference accuracy on held-out pairs, where it was
measured), `thresholds.jsonl` (`dfactory eval --thresholds` on the held-out instructions) and `preferred.jsonl` (`dfactory
generate` on the held-out requests that leave open what is wanted; the reward of one is 1 where `text`, without space around
it, equals the preferred `answer`). Expected numbers are those of recipes/quickstart/expected.json.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf
from rich.table import Table

from dfactory.errors import DataError

THRESHOLD = 0.9
FORMATS = {
    "exact match": "{:.1%}",
    "tokens per forward": "{:.2f}",
    "tokens per second": "{:,.0f}",
    "preference accuracy": "{:.1%}",
    "reward": "{:.3f}",
}


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a JSONL file. Raises DataError where it is missing or empty."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    if not rows:
        raise DataError(f"{path} is missing or empty: the stage that should have filled it did not finish")
    return rows


def stage_of(run: Path) -> str:
    config = run / "config.yaml"
    if not config.is_file():
        raise DataError(f"{config} does not exist: {run} is not the folder of a run")
    return OmegaConf.load(config).stage


def numbers(run: Path) -> dict[str, float]:
    """What is known of a run, by the names in FORMATS."""
    (here,) = (row for row in read_jsonl(run / "thresholds.jsonl") if row["threshold"] == THRESHOLD)
    answers = read_jsonl(run / "preferred.jsonl")
    found = {
        "exact match": here["exact_match"],
        "tokens per forward": here["tokens_per_forward"],
        "tokens per second": here["tokens_per_second"],
        "reward": sum(row["text"].strip() == row["answer"] for row in answers) / len(answers),
    }
    for row in read_jsonl(run / "metrics.jsonl"):
        if "eval/rewards/accuracies" in row:
            found["preference accuracy"] = row["eval/rewards/accuracies"]
    return found


def read_expected(recipes: Path) -> dict[str, dict[str, float]]:
    """The expected numbers by stage; `recipes` is the folder of all recipes."""
    return json.loads((recipes / "quickstart/expected.json").read_text(encoding="utf-8"))


def table(runs: Sequence[Path], expected: dict[str, dict[str, float]]) -> Table:
    shown = Table("after", *FORMATS, title=f"held-out, at threshold {THRESHOLD}; in brackets what is expected")
    for column in shown.columns[1:]:
        column.justify = "right"
    for run in runs:
        stage, found = stage_of(run), numbers(run)
        cells = []
        for name, form in FORMATS.items():
            cell = form.format(found[name]) if name in found else ""
            if name in found and name in expected.get(stage, {}):
                cell += f" ({form.format(expected[stage][name])})"
            cells.append(cell)
        shown.add_row(stage.upper(), *cells)
    return shown
