"""What is printed is what was said, also where it looks like rich's markup or an emoji's name."""

import json

import pytest
from rich.text import Text

from dfactory.cli import main
from dfactory.console import plain_console, print_hanging
from dfactory.recipe import Recipe
from dfactory.runs.folder import RunFolder
from dfactory.runs.metrics import MetricsLog

TEXTS = ["closed [/b] and never opened", "[red]", "[/]", ":smile:", "[link=file:///etc/passwd]x[/link]", "a[0] = b[/c]"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_stays_as_it_is(text, capsys):
    plain_console().print(text)
    assert capsys.readouterr().out == f"{text}\n"


@pytest.mark.parametrize("text", TEXTS)
def test_an_answer_does_not_end_the_run_that_shows_it(text, tmp_path, capsys):
    """rich raised MarkupError for a closing tag in what the model said."""
    metrics = {"loss": 1.0, "hit_rate": 0.5}
    with MetricsLog(Recipe(model_name_or_path="tiny", output_dir=str(tmp_path)), RunFolder(tmp_path), 2, 0) as log:
        log.evaluation(1, metrics, [{"expected": text, "answered": text}])
    assert f"{text!r} was right, {text!r} was answered" in capsys.readouterr().out


ROWS = [{"instruction": "Which day follows Monday?", "output": "Tuesday", "answer": "Tuesday"}] * 4


@pytest.mark.parametrize(
    "words",
    [
        ["check", "recipe.yaml"],
        ["data", "stats", "rows.jsonl", "--html", "page.html"],
        ["data", "validate", "rows.jsonl", "--model", "tiny", "--html", "page.html"],
        ["data", "token-count", "rows.jsonl", "--model", "tiny"],
        ["generate", "--model", "tiny", "--input", "rows.jsonl", "--output", "out.jsonl", "decode.max_new_tokens=4"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_a_path_that_is_longer_than_a_line_stays_whole(words, tmp_path, capsys):
    """A table broke it in the middle: it could neither be found with grep nor copied."""
    folder = tmp_path / ("a" * 70) / ("b" * 70)
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recipe = {"model_name_or_path": "tiny", "datasets": [{"path": "rows.jsonl"}], "block_size": 16, "max_length": 64}
    (folder / "recipe.yaml").write_text(json.dumps(recipe | {"output_dir": str(folder / "run")}))
    assert main([str(folder / word) if word.endswith((".jsonl", ".yaml", ".html")) else word for word in words]) == 0
    printed = capsys.readouterr()
    assert f"{'b' * 70}/" in printed.out + printed.err
    for line in (printed.out + printed.err).splitlines():
        assert ("a" * 9 in line) == ("b" * 70 in line), line


def test_text_hangs_to_the_right_of_its_name(capsys):
    console = plain_console(width=32)
    print_hanging(
        console, Text("name    "), Text("one two three four five six /a/path/longer/than/24/columns seven\neight")
    )
    assert capsys.readouterr().out.splitlines() == [
        "name    one two three four five",
        "        six",
        "        /a/path/longer/than/24/columns",
        "        seven",
        "        eight",
    ]
    print_hanging(plain_console(width=10), Text("name    "), Text("one two three four five six"))
    assert capsys.readouterr().out == "name    one two three four five\n        six\n"
