"""The pages say what the code does: every metric is explained, the hardware table is the forecast, links lead somewhere."""

import json
import re

import pytest

from dfactory.engine.trainer import deepspeed_config
from dfactory.models.hub import resolve
from dfactory.planning.memory import forecast, setup_of
from dfactory.recipe import load_recipe
from tests.commands.conftest import ROOT
from tests.test_docs import LINK, anchors, without_code

METRICS = (ROOT / "recipes/METRICS.md").read_text()
FOLDERS = ("benchmarks", "data_tools", "dfactory", "docs", "launch", "recipes", "tests")
PAGES = [*sorted(ROOT.glob("*.md")), *(page for name in FOLDERS for page in sorted((ROOT / name).rglob("*.md")))]
NAMED = re.compile(r'"([a-z_/]+)": (?:Mean\(|_mean\(|float\(|sum\(|time\.)|metrics\["([a-z_/]+)"\]')


def explained(metric: str) -> bool:
    """By its own name, or as one of a family."""
    family = re.sub(r"_t\d\.\d\d$", "_t0.30", re.sub(r"^rewards/[^/]+/mean$", "rewards/NAME/mean", metric))
    return f"`{family}`" in METRICS


def test_every_metric_of_a_run_is_explained(golden_run):
    rows = [json.loads(line) for line in (golden_run / "metrics.jsonl").read_text().splitlines()]
    assert [name for name in {name for row in rows for name in row} if not explained(name)] == []


def test_every_metric_in_the_code_is_explained():
    parts = ("algorithms/*.py", "engine/*.py", "rl/metrics.py", "rl/controller.py")
    files = [file for part in parts for file in (ROOT / "dfactory").glob(part)]
    names = {first or second for file in files for first, second in NAMED.findall(file.read_text())}
    assert len(names) > 25
    assert sorted(name for name in names if not explained(name)) == []


def hardware_rows() -> list[list[str]]:
    lines = (ROOT / "recipes/HARDWARE.md").read_text().splitlines()
    return [[cell.strip().strip("`") for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]


def test_the_hardware_table_is_the_forecast(monkeypatch):
    monkeypatch.chdir(ROOT)
    rows = hardware_rows()
    assert len(rows) > 15
    for file, overrides, ranks, device, host in rows:
        recipe = load_recipe(f"recipes/{file}", overrides.split())
        setup = setup_of(recipe, deepspeed_config(recipe), int(ranks))
        memory = forecast(resolve(recipe.model_name_or_path, recipe.model_revision, weights=False), setup)
        told = [f"{memory.device_bytes / 1e9:.0f}", f"{memory.host_bytes * min(int(ranks), 8) / 1e9:.0f}"]
        assert [device, host] == told, (file, overrides, ranks)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(page):
    text = without_code(page.read_text())
    for link in LINK.findall(text):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert link.startswith("http") or target.exists(), link
        assert not anchor or link.startswith("http") or anchor in anchors(target), link
    for path in re.findall(r"`((?:recipes|launch|dfactory|data_tools|tests|benchmarks)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
