"""`dfactory quickstart`: the embedded model through SFT, CAP, DPO and RL on a CPU, each evaluated, beside what is expected.

recipes/quickstart/stages.json says which stage starts from the model of which. RL does not start from CAP's: that model is
so sure of its answers that all of a group are alike, which leaves RL nothing to compare. Each step is a `dfactory` with its
own process and the arguments that a user would type. A finished run is reused, an interrupted one continues.
"""

import hashlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dfactory.commands.quickstart_table import read_expected, table
from dfactory.commands.recipes import recipes_folder
from dfactory.console import plain_console
from dfactory.errors import ConfigError

DFACTORY = (sys.executable, "-m", "dfactory.cli")
OUTPUT = "output_dir="
DONE = "quickstart.done"
THRESHOLDS, PREFERRED = "thresholds.jsonl", "preferred.jsonl"
SHORT = "decode.max_new_tokens=32"


class StepFailed(Exception):
    """A step ended with another status than 0; it has said why."""

    def __init__(self, status: int):
        super().__init__(f"exit status {status}")
        self.status = status


class Stage(NamedTuple):
    """One stage of the quickstart."""

    name: str
    run: Path
    start: Path | None  # the run that it starts from; None: the recipe's own model


def quickstart(words: Sequence[str], dfactory: Sequence[str] = DFACTORY) -> int:
    """Run all stages with the keys `words`, which apply to each, and print the table. Returns the status of the first step
    that fails, else 0.

    Raises ConfigError for a run folder that holds something else, and where an extra is missing that the last stage needs.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "the last stage of the quickstart runs on Ray, which is not installed: pip install 'dfactory[rl]'"
        )
    recipes = recipes_folder()
    stages = read_stages(recipes, root_of(words))
    try:
        so_far = ""
        for stage in stages:
            so_far = _train(recipes, stage, words, so_far, dfactory)
            _answer(recipes, stage.run, dfactory)
        runs = [stage.run for stage in stages]
        for chain in ([], ["--chain"]):
            _call(dfactory, "report", *chain, *runs)
    except StepFailed as failed:
        return failed.status
    plain_console().print(table(runs, read_expected(recipes)))
    return 0


def root_of(words: Sequence[str]) -> Path:
    """The run folder of the first stage, absolute; those of the others have their names appended."""
    given = [word.removeprefix(OUTPUT) for word in words if word.startswith(OUTPUT)]
    return Path(given[-1] if given else "runs/quickstart").absolute()


def read_stages(recipes: Path, root: Path) -> list[Stage]:
    """The stages in their order; the run of the first is `root` itself."""
    starts = json.loads((recipes / "quickstart/stages.json").read_text(encoding="utf-8"))
    runs = {name: root if start is None else root.with_name(f"{root.name}_{name}") for name, start in starts.items()}
    return [Stage(name, runs[name], runs.get(start)) for name, start in starts.items()]


def _train(recipes: Path, stage: Stage, words: Sequence[str], so_far: str, dfactory: Sequence[str]) -> str:
    """Train, unless there is a finished run with the same recipes and keys. Returns the digest of all up to this one."""
    recipe, run = recipes / f"quickstart/{stage.name}.yaml", stage.run
    keys = [*words, *([] if stage.start is None else [f"model_name_or_path={stage.start}"])]
    wanted = digest([recipe, *sorted((recipes / "quickstart/data").glob("*.jsonl"))], [so_far, *keys])
    done = run / DONE
    if done.is_file():
        if done.read_text().strip() != wanted:
            raise ConfigError(f"{run} holds a run with another recipe or other keys: remove it, or give output_dir=DIR")
        return wanted
    resume = ["resume_from_checkpoint=true"] if (run / "LATEST").is_file() else []
    for name in (THRESHOLDS, PREFERRED):
        (run / name).unlink(missing_ok=True)
    _call(dfactory, "train", recipe, *keys, f"{OUTPUT}{run}", *resume)
    done.write_text(wanted + "\n")
    return wanted


def digest(files: Sequence[Path], words: Sequence[str]) -> str:
    """SHA-256 over the files and the words, a line each."""
    text = b"".join(file.read_bytes() for file in files) + "\n".join(words).encode()
    return hashlib.sha256(text.rstrip(b"\n") + b"\n").hexdigest()


def _answer(recipes: Path, run: Path, dfactory: Sequence[str]) -> None:
    """Answer the held-out instructions at several thresholds, and the requests whose preferred reading DPO and RL are
    about, unless that is done."""
    data = recipes / "quickstart/data"
    if not _is_filled(run / THRESHOLDS):
        words = ("--model", run, "--data", data / "heldout.jsonl", "--thresholds", "0.5,0.7,0.9")
        _call(dfactory, "eval", *words, "--output", run / THRESHOLDS, SHORT)
    if not _is_filled(run / PREFERRED):
        words = ("--model", run, "--input", data / "preferred_heldout.jsonl", "--output", run / PREFERRED)
        _call(dfactory, "generate", *words, SHORT, "decode.threshold=0.9")


def _is_filled(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0


def _call(dfactory: Sequence[str], *words: str | Path) -> None:
    status = subprocess.run([*dfactory, *map(str, words)], check=False).returncode
    if status:
        raise StepFailed(status)
