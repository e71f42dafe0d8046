"""`dfactory report --watch`: tables that grow, filters, the server, and the page in a real browser."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from dfactory.cli import main
from dfactory.commands.reporting.figures import FIGURES
from dfactory.commands.reporting.live import Filter, Table, WatchedRun, completions, run_folders
from dfactory.commands.reporting.page import final_numbers
from dfactory.commands.reporting.runs import read_run
from dfactory.runs.folder import RunFolder
from dfactory.runs.ownership import held_by_run, is_running
from dfactory.serving.pages import Page
from tests.browser import PHONE, browsing, tab
from tests.commands.test_browser import TEXTS
from tests.commands.test_report import write_run

ROOT = Path(__file__).parents[2]
ROWS = [{"step": step, "loss": 10.0 / step, "reward": step / 9, "epoch": step / 9} for step in range(1, 9)]
NAMELESS = """() => [...document.querySelectorAll('input, select, textarea, button, svg[role]')]
    .filter(e => !e.labels?.length && !e.getAttribute('aria-label') && !e.textContent.trim()).map(e => e.outerHTML)"""


def rollouts(step: int, group: int, rewards: list[float | None], text: str = "answer") -> list[dict]:
    said = {
        "step": step,
        "group": group,
        "origin": f"{'a/long/folder' * 9}.jsonl:1",
        "prompt": [{"role": "user", "content": f"asked {group}"}],
    }
    return [
        said
        | {"completion": f"{text} {index}", "reward": reward, "exact_match": reward, "advantage": 0.5, "version": 1}
        for index, reward in enumerate(rewards)
    ]


GROUPS = [*rollouts(1, 0, [0.0, 0.0]), *rollouts(2, 1, [1.0, 0.0], "Better"), *rollouts(3, 2, [1.0, 1.0, None])]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def run(tmp_path) -> Path:
    folder = write_run(tmp_path / "runs" / "mine", ROWS, "stage: rl\nmax_steps: 8\n")
    (folder / "completions.jsonl").write_text(lines(GROUPS))
    return folder


# --- what is read ------------------------------------------------------------------------------------------------------


def test_a_table_grows(tmp_path):
    file = tmp_path / "metrics.jsonl"
    table = Table(file)
    table.read()
    assert not table.rows
    file.write_text(lines(ROWS[:2]) + '{"step": 3, "lo')
    table.read()
    assert [row["step"] for row in table.rows] == [1, 2]
    with file.open("a") as stream:
        stream.write('ss": 1.0}\nno object\n[4]\n' + lines(ROWS[4:5]))
    table.read()
    assert ([row["step"] for row in table.rows], table.bad) == ([1, 2, 3, 5], 2)
    replaced = tmp_path / "new"
    replaced.write_text(lines(ROWS[:6]))  # longer than the old one
    replaced.replace(file)
    table.read()
    assert ([row["step"] for row in table.rows], table.bad) == ([1, 2, 3, 4, 5, 6], 0)
    file.write_text(lines(ROWS[:1]))  # cut
    table.read()
    assert len(table.rows) == 1


def test_a_run_that_is_held_is_running(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert not is_running(folder.path)
    with held_by_run(folder):
        assert is_running(folder.path)
    assert not is_running(folder.path)


def test_the_data_are_those_of_the_static_report(run):
    watched = WatchedRun("mine", run)
    watched.refresh()
    found, static = watched.report(), read_run(run, "mine")
    assert found["numbers"] == final_numbers(static)
    assert (found["state"], found["step"], found["of"]) == ("finished", 8, 8)
    drawn = {panel["title"]: panel["lines"] for figure in found["figures"] for panel in figure["panels"]}
    for panel in (panel for panels in FIGURES.values() for panel in panels):
        steps, values = static.curve(panel.metric)
        assert (panel.title in drawn) == (len(steps) > 0)
        if len(steps):
            assert drawn[panel.title][0]["steps"] == steps.tolist()
            assert drawn[panel.title][0]["values"] == pytest.approx(values.tolist(), rel=1e-5)
    (run / "config.yaml").write_text("stage: rl\nmax_steps: 20\n")
    watched.refresh()
    assert watched.about()["state"] == "ended early"


def test_runs_are_found_below_a_folder(run, tmp_path):
    write_run(tmp_path / "runs" / "more" / "deep", ROWS[:1])
    write_run(tmp_path / "runs" / "mine" / "checkpoint-1" / "not", ROWS[:1])
    (tmp_path / "runs" / "linked").symlink_to(run)
    assert [*run_folders([tmp_path / "runs"])] == ["mine", "more/deep"]
    assert [*run_folders([run])] == ["mine"]


@pytest.mark.parametrize(
    "chosen, groups",
    [
        (Filter(), [2, 1, 0]),
        (Filter(order="oldest"), [0, 1, 2]),
        (Filter(order="lowest reward"), [0, 1, 2]),
        (Filter(order="highest reward"), [2, 1, 0]),
        (Filter(low=0.5), [2, 1]),
        (Filter(high=0.5), [1, 0]),
        (Filter(first=2, last=2), [1]),
        (Filter(text="bEtter"), [1]),
        (Filter(text="asked 2"), [2]),
        (Filter(mixed=True, low=0.5, first=2), [2, 1]),
        (Filter(mixed=True, high=0.9), [1]),
    ],
)
def test_completions_are_filtered(chosen, groups):
    found = completions(deque(GROUPS), chosen, 0)
    assert [group["group"] for group in found["groups"]] == groups
    assert (found["found"], found["of"], found["pages"]) == (len(groups), 3, 1)


def test_a_group_is_shown_whole():
    (group,) = completions(deque(GROUPS), Filter(low=0.5, last=2), 0)["groups"]
    assert [row["chosen"] for row in group["rows"]] == [True, False]
    assert (group["functions"], group["mean"], group["prompt"]) == (["exact_match"], 0.5, "asked 1")
    assert completions(deque(GROUPS), Filter(), 1)["groups"] == []


# --- over HTTP ---------------------------------------------------------------------------------------------------------


class Watched(NamedTuple):
    url: str
    process: subprocess.Popen

    def get(self, path: str, **headers: str) -> tuple[int, dict]:
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.url + path, headers=headers), timeout=60
            ) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as refused:
            return refused.code, json.loads(refused.read())


@contextlib.contextmanager
def watching(folder: Path, log: Path) -> Iterator[Watched]:
    command = [sys.executable, "-m", "dfactory.cli", "report", "--watch", str(folder), "--port", "0"]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=file)
    try:
        ends = time.monotonic() + 180
        while not (found := re.search(r"runs on (http://\S+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < ends, log.read_text()
            time.sleep(0.05)
        yield Watched(found.group(1), process)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Iterator[tuple[Path, Watched]]:
    """A folder of runs, and the server that watches it."""
    folder = tmp_path_factory.mktemp("watched")
    run = write_run(
        folder / "runs" / "mine", ROWS, "stage: rl\nmax_steps: 20\nhf_token: hf_abcdefghijklmnopqrstuvwxyz\n"
    )
    (run / "completions.jsonl").write_text(lines(GROUPS))
    (run / "thresholds.jsonl").write_text(lines([{"threshold": 0.9, "tokens_per_forward": 2.0, "exact_match": 0.5}]))
    with watching(folder / "runs", folder / "log") as watched:
        yield folder / "runs", watched


def test_the_list_follows_the_folder(shared):
    runs, watched = shared
    with urllib.request.urlopen(f"{watched.url}/runs", timeout=60) as stream:
        first = json.loads(stream.readline()[6:])["runs"]
        assert [(one["name"], one["state"], one["step"]) for one in first] == [("mine", "ended early", 8)]
        stream.readline()
        write_run(runs / "other", ROWS[:3])
        second = json.loads(stream.readline()[6:])["runs"]
        assert [(one["name"], one["step"]) for one in second] == [("mine", 8), ("other", 3)]
    status, found = watched.get("/run?name=mine")
    assert (status, [*found["pictures"]]) == (200, ["tradeoff"])
    assert "hf_abcdef" not in found["config"]
    with urllib.request.urlopen(f"{watched.url}/picture?name=mine&what=tradeoff", timeout=60) as picture:
        assert picture.read(8) == b"\x89PNG\r\n\x1a\n"
    _, found = watched.get("/completions?name=mine&low=0.5&mixed=true&order=oldest")
    assert [group["group"] for group in found["groups"]] == [1, 2]


@pytest.mark.parametrize(
    "path, status",
    [
        ("/run?name=../../etc", 404),
        ("/run", 404),
        ("/picture?name=mine&what=loss", 404),
        ("/picture?name=mine&what=memory", 404),
        ("/completions?name=mine&low=much", 400),
        ("/completions?name=mine&order=best", 400),
        ("/page/../cli.py", 404),
    ],
)
def test_what_there_is_not(shared, path, status):
    assert shared[1].get(path)[0] == status


def test_another_host_name_is_refused(shared):
    assert shared[1].get("/run?name=mine", Host="evil.example")[0] == 403


def test_options_that_cannot_be(tmp_path, capsys, monkeypatch):
    assert main(["report", "--watch", "--chain", str(tmp_path)]) == 2
    assert "--watch with --chain" in capsys.readouterr().err
    assert main(["report", "--watch", str(tmp_path / "nowhere")]) == 1
    assert "nowhere does not exist" in capsys.readouterr().err
    monkeypatch.delenv("DFACTORY_SERVE_TOKEN", raising=False)
    assert main(["report", "--watch", str(tmp_path), "--host", "0.0.0.0"]) == 2


# --- in a browser ------------------------------------------------------------------------------------------------------


def test_the_page_follows_a_run_and_asks_nobody_else(shared):
    runs, watched = shared
    run = write_run(runs / "a_first", ROWS[:4], "stage: rl\n")
    (run / "completions.jsonl").write_text(lines([*GROUPS, *rollouts(4, 3, [0.25], TEXTS[0])]))
    with browsing() as browser, tab(browser, watched.url, viewport=PHONE) as (page, said, asked):
        page.get_by_role("checkbox", name="a_first").wait_for()
        if not page.get_by_role("checkbox", name="a_first").is_checked():
            page.get_by_role("checkbox", name="a_first").check()
        if page.get_by_role("checkbox", name="mine").is_checked():
            page.get_by_role("checkbox", name="mine").uncheck()
        page.get_by_role("img", name="loss. training: 10 at step 1, 2.5 at step 4").wait_for()
        with (run / "metrics.jsonl").open("a") as stream:
            stream.write(lines(ROWS[4:5]))
        chart = page.get_by_role("img", name="loss. training: 10 at step 1, 2 at step 5")
        chart.focus()
        page.keyboard.press("ArrowLeft")
        assert page.locator("figure").first.locator(".readout").inner_text() == "step 4: training 2.5"
        page.get_by_label("Reward from").fill("0.2")
        page.get_by_text("3 of 4 groups").wait_for()
        page.get_by_label("groups with different rewards only").check()
        page.get_by_text("2 of 4 groups").wait_for()
        page.get_by_role("button", name="Clear").click()
        page.get_by_text("4 of 4 groups").wait_for()
        assert page.get_by_role("article", name=None).first.locator(".said").nth(1).inner_text() == f"{TEXTS[0]} 0"
        assert page.evaluate("() => document.documentElement.hasAttribute('data-ran')") is False
        page.get_by_role("checkbox", name="mine").check()
        page.get_by_role("img", name="loss. a_first, training").wait_for()
        page.get_by_text("tradeoff of mine").click()
        page.get_by_alt_text("tradeoff of mine").and_(page.locator("[src^='blob:']")).wait_for()
        assert page.evaluate(NAMELESS) == []
        assert page.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        assert said == []
        paths = {address.removeprefix(watched.url).partition("?")[0] for address in asked if address.startswith("http")}
        assert paths == Page("runs").paths | {"/runs", "/run", "/completions", "/picture"}


def test_sigterm_ends_it_with_status_0(shared):
    _, watched = shared
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{watched.url}/runs", timeout=60) as stream:
        stream.readline()
        watched.process.send_signal(signal.SIGTERM)
        assert watched.process.wait(60) == 0
