"""The pages of docs/ that say how to do something: their commands run, or the page says why not.

In a how-to page a block `sh` is run, in the page's order, in an empty folder with the files that the page shows under a
title. A block `text` is not run; the sentence before it says why. On the other pages every command is in TESTED, with the
test that runs it, or in NOT_RUN.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("howto_*.md"))
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
COMMAND = re.compile(
    r"^(?:    |\$ )?((?:[A-Z_]+=\S+ )*(?:dfactory (?!\w+:)|python |bash |pip |docker |sbatch |vllm ).*)$", re.MULTILINE
)
TESTED = {
    "dfactory doctor": "tests/commands/test_doctor.py",
    "dfactory recipes": "tests/commands/test_quickstart.py",
    "dfactory quickstart": "tests/commands/test_quickstart.py",
    "dfactory check recipes/quickstart/sft.yaml": "tests/test_wheel.py",
    "dfactory --version": "tests/commands/test_quickstart.py",
    "dfactory train recipes/quickstart/sft.yaml stage=focal": "tests/test_outside_package.py",
    "dfactory train recipes/quickstart/cpt.yaml": "tests/test_outside_package.py",
    "dfactory generate --model runs/focal": "tests/test_outside_package.py",
    "dfactory generate --model runs/mine --input prompts.jsonl --output answers.jsonl decode.compile=true": (
        "tests/decoding/test_compiled.py"
    ),
    "dfactory export --model runs/mine --output mine/": "tests/commands/test_card.py",
    "dfactory report --chain": "tests/commands/test_report.py",
    "dfactory report --watch": "tests/commands/test_watch.py",
    "dfactory serve --model runs/mine": "tests/serving/test_server.py",
    "dfactory serve --model runs/sft --beside": "tests/serving/test_live.py",
    "dfactory train recipes/quickstart/sft.yaml report_to=": "tests/runs/test_tracker.py",
    "dfactory train recipes/quickstart/sft.yaml eval_steps=20": "tests/engine/test_course.py",
    "dfactory train recipes/quickstart/sft.yaml gradient_checkpointing=true": "tests/engine/test_options.py",
}
NOT_RUN = {"docker run": "no image is built here: docs/install.md says so"}


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """(language, title, text) of the fenced blocks."""
    return BLOCK.findall(page.read_text())


def test_there_is_a_page_for_each_task():
    tasks = {page.stem.removeprefix("howto_") for page in PAGES}
    assert {"jsonl", "reward", "model", "cluster", "laptop"} <= tasks


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_block_that_is_not_run_is_explained(page):
    text = page.read_text()
    for match in BLOCK.finditer(text):
        if match[1] == "text":
            before = text[: match.start()].rstrip().rpartition("\n\n")[2]
            assert re.search(r"[Nn]ot run|no test runs|[Nn]either is run", before), f"{page.name}: {match[3][:60]}"


def test_every_command_of_the_other_pages_is_run_or_marked():
    unknown = []
    for page in sorted(set(DOCS.glob("*.md")) - set(PAGES)):
        text = re.sub(r"^```python.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for command in COMMAND.findall(text):
            if not command.startswith((*TESTED, *NOT_RUN)):
                unknown.append(f"{page.name}: {command}")
    assert unknown == []
    assert all((ROOT / file).is_file() for file in TESTED.values())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_run(page, tmp_path):
    for language, title, text in blocks(page):
        if title:
            (tmp_path / title).write_text(text)
        elif language == "sh":
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                ["sh", "-e"], input=text, cwd=tmp_path, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
