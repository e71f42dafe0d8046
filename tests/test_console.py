"""What is printed is what was said, also where it looks like rich's markup or an emoji's name."""

import pytest

from dfactory.console import plain_console
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
