"""The pages of docs/: the tutorial prints what it says, links and paths lead somewhere.

tests/tutorial.py runs the tutorial, and writes what it prints.
"""

import json
import re
from pathlib import Path

import pytest
import torch

from dfactory.commands.families import family_table
from dfactory.commands.schema import algorithm_table, rule_table
from dfactory.decoding.rules.base import COLUMNS, Forward
from tests import tutorial

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
DECIMAL = re.compile(r"-?\d+\.\d+")
CITATION = re.compile(r"docs/(\w+\.md)(?:#([\w-]+))?")
ARXIV = re.compile(r"arXiv[:\s#]+(\d{4}\.\d{5})", re.IGNORECASE)
UNSHIPPED = re.compile(  # names of pages, and tags of papers, that this repository does not explain
    r"\bMETHOD(?:\.md)?,? section|\b(?:METHOD|ARCHITECTURE|LLADA2|FAMILIES|STYLE)\.md|\[(?:[LD]\d+|BD3|TR|CJ|DP|MED|FD)\]"
)
CODE = ("dfactory", "data_tools", "benchmarks", "recipes", "tests", "launch", "examples", ".ci")
TEXT = {".py", ".md", ".yaml", ".yml", ".sh", ".cfg"}
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE_PATH = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|md|yml|yaml|json|jsonl|sh|txt|cfg))`")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The names of its headings, as mkdocs and GitHub make them."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page):
    text = without_code(page.read_text())
    for link in LINK.findall(text):
        file, _, anchor = link.partition("#")
        target = page if not file else page.parent / file
        assert target.is_file(), link
        assert target.parent == DOCS, f"{link}: a link out of docs/ is dead in the site; give the path as code"
        assert not anchor or anchor in anchors(target), link
    for path in CODE_PATH.findall(text):
        assert (ROOT / path).exists() or (ROOT / "dfactory" / path).exists() or path.startswith(("build/", "runs/")), (
            path
        )


CITING = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "setup.cfg"]
CITING += [file for part in CODE for file in sorted((ROOT / part).rglob("*")) if file.suffix in TEXT]


def test_citations_in_the_code_lead_to_a_section():
    wrong, count = [], 0
    for file in CITING:
        for page, anchor in CITATION.findall(file.read_text()):
            count += 1
            if not (DOCS / page).is_file() or (anchor and anchor not in anchors(DOCS / page)):
                wrong.append(f"{file.relative_to(ROOT)}: docs/{page}#{anchor}")
    assert not wrong
    assert count > 30


def test_papers_that_are_cited_are_listed():
    method = (DOCS / "method.md").read_text()
    listed = set(re.findall(r"\d{4}\.\d{5}", method.partition("## Sources")[2]))
    assert len(listed) > 10
    unlisted = [
        (file.name, number) for file in CITING for number in ARXIV.findall(file.read_text()) if number not in listed
    ]
    assert not unlisted
    assert set(ARXIV.findall(method)) <= listed


def test_nothing_cites_what_does_not_ship():
    found = [(file.name, UNSHIPPED.findall(file.read_text())) for file in CITING if file != Path(__file__)]
    assert [entry for entry in found if entry[1]] == []


def test_headings_of_a_page_are_unique():
    """Else an anchor leads to the first of them."""
    for page in PAGES:
        headings = re.findall(r"^#+ (.+)$", without_code(page.read_text()), re.MULTILINE)
        assert len(headings) == len(set(headings)) == len(anchors(page)), page.name


def test_the_page_of_families_has_their_table():
    assert family_table() in (DOCS / "families.md").read_text(), "`dfactory schema --families` prints it"


def test_the_page_of_algorithms_has_their_table():
    assert algorithm_table() in (DOCS / "algorithms.md").read_text(), "`dfactory schema --algorithms` prints it"


def test_the_decoding_page_has_the_tables_of_rules_and_columns():
    page = (DOCS / "decoding.md").read_text()
    assert rule_table() in page, "`dfactory schema --rules` prints it"
    for column in COLUMNS:
        assert f"| `{column.name.upper()}` | {column.meaning} |" in page


def test_the_package_of_the_extending_page_is_the_one_that_is_tested():
    shown = re.findall(
        r"^`(tests/outside_package/[^`]+)`:\n\n```\w+\n(.*?)```", (DOCS / "extending.md").read_text(), re.M | re.S
    )
    written = {file.relative_to(ROOT).as_posix() for file in (ROOT / "tests/outside_package").rglob("[!_]*.[pt][yo]*")}
    assert {name for name, _ in shown} == {name for name in written if name.endswith((".py", ".toml"))}
    for name, text in shown:
        assert text == (ROOT / name).read_text(), name


def test_the_rule_of_the_decoding_page_is_one():
    page = (DOCS / "decoding.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1).replace("@RULES.add\n", "")
    names: dict = {}
    exec(compile(code, "docs/decoding.md", "exec"), names)
    columns = {"margin": torch.tensor([[0.6, 0.1, 0.7], [0.2, 0.1, 0.3]])}
    masked_RB = torch.tensor([[True, True, False], [True, True, True]])
    forward = Forward(None, None, masked_RB, ~masked_RB, torch.zeros(2), columns, {})
    assert names["Margin"]().commit(forward).tolist() == [[True, False, False], [False, False, True]]


@pytest.mark.parametrize("column, size", enumerate(("mini", "flash"), start=1))
def test_the_families_page_has_the_public_sizes(column, size):
    config = json.loads((ROOT / f"recipes/llada2_{size}/model/config.json").read_text())
    table = (DOCS / "families.md").read_text().partition("| key | mini | flash |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    stated = {
        name: value for row in rows for name, value in zip(row[0].split(" / "), row[column].split(" / "), strict=True)
    }
    assert len(stated) > 15
    assert stated == {name: json.dumps(config[name]) for name in stated}


def alike(printed: str, stated: str) -> bool:
    """The same text, whose decimals differ by one in their last digit at most: another CPU rounds otherwise."""
    if DECIMAL.sub("#", printed) != DECIMAL.sub("#", stated):
        return False
    for one, other in zip(DECIMAL.findall(printed), DECIMAL.findall(stated), strict=True):
        if abs(float(one) - float(other)) > 1.01 * 10 ** -len(other.partition(".")[2]):
            return False
    return True


def test_alike():
    assert alike("p 0.879 and 3", "p 0.880 and 3")
    assert not alike("p 0.879 and 3", "p 0.881 and 3")
    assert not alike("p 0.879 and 3", "p 0.879 and 4")


@pytest.mark.slow
def test_the_tutorial_prints_what_it_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = tutorial.PAGE.read_text()
    steps = [(printed, step["stated"] or "") for step, printed in tutorial.run(text)]
    assert len(steps) == text.count("```python") > 10
    for printed, stated in steps:
        assert alike(printed, stated), f"printed:\n{printed}\nstated:\n{stated}\n`python -m tests.tutorial` writes it"
