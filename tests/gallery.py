"""The pictures of docs/gallery.md, drawn from the numbers that recipes state: `python -m tests.gallery` writes them.

Bars as plain SVG: a few kilobytes, equal on every machine, so tests/test_gallery.py compares the files with what this draws.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
WIDTH, ROW, LABEL, SCALE = 640, 26, 170, 330
INK, PALE, FIRST, SECOND = "#1f2933", "#7b8794", "#2f6db5", "#d9822b"


class Bar(NamedTuple):
    """One number and how it is written."""

    label: str
    value: float
    largest: float  # what a bar of full length stands for
    written: str
    color: str


def draw(title: str, groups: list[list[Bar]]) -> str:
    """An SVG: groups of bars from top to bottom, with a label on the left and the number on the right of each."""
    height = 40 + sum(ROW * len(group) + 12 for group in groups)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" font-family="sans-serif" '
        f'font-size="13" fill="{INK}">',
        f"<title>{title}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="12" y="24" font-weight="bold">{title}</text>',
    ]
    y = 40
    for group in groups:
        for bar in group:
            length = round(SCALE * bar.value / bar.largest, 1)
            parts += [
                f'<text x="{LABEL - 8}" y="{y + 17}" text-anchor="end">{bar.label}</text>',
                f'<rect x="{LABEL}" y="{y + 4}" width="{length}" height="{ROW - 8}" rx="2" fill="{bar.color}"/>',
                f'<text x="{LABEL + length + 6}" y="{y + 17}" fill="{PALE}">{bar.written}</text>',
            ]
            y += ROW
        y += 12
    return "\n".join([*parts, "</svg>"]) + "\n"


def quickstart() -> str:
    """Exact match and tokens per forward after each stage: recipes/quickstart/expected.json."""
    expected = json.loads((ROOT / "recipes/quickstart/expected.json").read_text())
    groups = [
        [
            Bar(stage.upper(), n["exact match"], 1.0, f"{n['exact match']:.1%} exact match", FIRST),
            Bar("", n["tokens per forward"], 8.0, f"{n['tokens per forward']:.2f} tokens a forward", SECOND),
        ]
        for stage, n in expected.items()
    ]
    return draw("The quickstart's stages, 200 held-out instructions, threshold 0.9", groups)


def patterns() -> str:
    """The same for each attention pattern: the table of recipes/patterns/README.md, the mean of its seeds."""
    groups = []
    for name, seeds, tokens in pattern_rows():
        mean = sum(seeds) / len(seeds)
        groups.append(
            [
                Bar(name, mean, 100.0, f"{mean:.1f}% exact match", FIRST),
                Bar("", tokens, 8.0, f"{tokens:.2f} tokens a forward", SECOND),
            ]
        )
    return draw("The same tasks for each attention pattern, three seeds", groups)


def pattern_rows() -> list[tuple[str, list[float], float]]:
    """(pattern, exact match of each seed in percent, tokens per forward)."""
    text = (ROOT / "recipes/patterns/README.md").read_text()
    rows = re.findall(r"^\| (\w+) \| \d+ \| ([\d., ]+) \| ([\d.]+) \|", text, re.MULTILINE)
    return [(name, [float(seed) for seed in seeds.split(", ")], float(tokens)) for name, seeds, tokens in rows]


PICTURES = {"gallery_quickstart.svg": quickstart, "gallery_patterns.svg": patterns}

if __name__ == "__main__":
    for file, picture in PICTURES.items():
        (DOCS / file).write_text(picture())
        print(DOCS / file)
