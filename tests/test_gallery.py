"""docs/gallery.md: its pictures are drawn from the recipes' numbers, and every recipe folder is in it."""

import json
import re
from xml.etree import ElementTree

import pytest

from tests.gallery import DOCS, PICTURES, ROOT, pattern_rows

PAGE = (DOCS / "gallery.md").read_text()


@pytest.mark.parametrize("file", PICTURES)
def test_a_picture_is_what_the_numbers_draw(file):
    drawn = PICTURES[file]()
    assert (DOCS / file).read_text() == drawn, "`python -m tests.gallery` writes it"
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    assert f"]({file})" in PAGE


def test_every_folder_of_recipes_is_shown():
    folders = {file.parent.name for file in (ROOT / "recipes").glob("*/*.yaml")}
    assert {folder for folder in folders if f"`recipes/{folder}/" not in PAGE} == set()


def test_the_numbers_of_the_quickstart():
    expected = json.loads((ROOT / "recipes/quickstart/expected.json").read_text())
    rows = re.findall(r"^\| `recipes/quickstart/(\w+)\.yaml` \|.*\| ([\d.]+)% \| ([\d.]+) \|", PAGE, re.MULTILINE)
    assert {stage: (float(match) / 100, float(tokens)) for stage, match, tokens in rows} == {
        stage: (round(numbers["exact match"], 3), round(numbers["tokens per forward"], 2))
        for stage, numbers in expected.items()
    }


def test_the_patterns_are_all_drawn():
    assert len(pattern_rows()) == 5
