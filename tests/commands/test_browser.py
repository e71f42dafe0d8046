"""Pages that show what a model wrote, in a real browser: no script of it runs, whatever it writes and wherever it stands."""

import json
import subprocess
from pathlib import Path

import pytest

from dfactory.commands.report import write_report
from dfactory.denoising import Frame, Run, State
from dfactory.serving.trace import Turn, write_trace
from tests.browser import ALONE, BROWSER, QUIET

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium is installed: apt-get install chromium")
HALF = "\ud800"  # of a character: it has no bytes
OWN = "document.documentElement.setAttribute('data-ran', 'ow' + 'ned')"  # the text itself never holds the word
TEXTS = (
    f"<script>{OWN}</script>",
    f"</td></table></pre></style></title></textarea></script><script>{OWN}</script>",
    f'<img src=x onerror="{OWN}">',
    f'<svg onload="{OWN}"><animate onbegin="{OWN}" attributeName=x dur=1s>',
    f"<svg><script>{OWN}</script></svg>",
    f'<iframe srcdoc="<script>parent.{OWN}</script>"></iframe>',
    f'<iframe src="javascript:parent.{OWN}"></iframe>',
    f'<body onload="{OWN}">',
    f'<details open ontoggle="{OWN}">x</details>',
    f'<input autofocus onfocus="{OWN}">',
    f'<video><source onerror="{OWN}"></video>',
    f'<object data="javascript:{OWN}"></object>',
    f'<meta http-equiv=refresh content="0; url=javascript:{OWN}">',
    f'"><script>{OWN}</script>',
    f"'-alert(1)-'</script><script>{OWN}//",
    f"<!--><script>{OWN}</script>-->",
    f"<![CDATA[><script>{OWN}</script>]]>",
    f"<scr\0ipt>{OWN}</script>",
    f"+ADw-script+AD4-{OWN}+ADw-/script+AD4-",
    f"&lt;script&gt;{OWN}&lt;/script&gt;",
    f"\\u003cscript\\u003e{OWN}\\u003c/script\\u003e",
    f'${{{OWN}}}{{{{constructor.constructor("{OWN}")()}}}}',
    f"<style>@import 'data:text/css,*{{x:expression({OWN})}}';</style>",
    f'<math><mtext></table><mglyph><style><img src=x onerror="{OWN}">',
    f"TITLE FRAMES \u2028\u2029 half {HALF} <script>{OWN}</script>",
)


def opened(page: Path, profile: Path) -> str:
    """What the page has become when everything in it has had 3 s."""
    command = [
        BROWSER,
        *ALONE,
        *QUIET,
        f"--user-data-dir={profile}",
        "--virtual-time-budget=3000",
        "--dump-dom",
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_the_browser_runs_what_stands_there_as_markup(tmp_path):
    """Without this, the others would pass in a browser that runs nothing."""
    ran = 0
    for number, text in enumerate(TEXTS[:3]):
        page = tmp_path / f"{number}.html"
        page.write_text(f"<!doctype html><meta charset=utf-8><table><tr><td>{text}</table>")
        ran += "owned" in opened(page, tmp_path / "profile")
    assert ran == 3


def test_nothing_of_a_model_runs_in_a_report(tmp_path):
    """In completions and prompts, as text and as messages; in rewards, names of runs and metrics, recipes."""
    runs = []
    for start in range(0, len(TEXTS), 8):  # so many completions of a run are shown
        texts = TEXTS[start : start + 8]
        run = tmp_path / f"{start} <img src=x onerror={OWN}>"
        run.mkdir()
        rows = [{"step": step, "loss": 1.0} | {f"seconds/{text}": 1.0 for text in texts} for step in (1, 2)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (run / "config.yaml").write_text(
            f"stage: {json.dumps(texts[0].replace(HALF, ''))}\nrun_name: {json.dumps(texts[-1])}\n"
        )
        prompts = [text if place % 2 else [{"role": "user", "content": text}] for place, text in enumerate(texts)]
        lines = [
            {"step": step, "group": 0, "prompt": prompt, "completion": text, "reward": text}
            for step, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
        ]
        (run / "completions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        runs.append(run)
    page = write_report(runs, tmp_path / "out")
    assert page.read_text().count("<td>") > 3 * len(TEXTS)
    dom = opened(page, tmp_path / "profile")
    assert "completions of" in dom
    assert "owned" not in dom
    for tag in ("<script", "<iframe", "<svg", "<object", "<video", "<img src=x", '<img src="x'):
        assert tag not in dom, tag


def test_nothing_of_a_model_runs_in_a_trace(tmp_path):
    """Its own script does, and shows the texts."""
    frames = [Frame(1, 1, "threshold 0.9", (Run(State.COMMITTED, text), Run(State.EDITED, text))) for text in TEXTS]
    page = tmp_path / "trace.html"
    write_trace(page, [Turn(text, frames) for text in TEXTS])
    dom = opened(page, tmp_path / "profile")
    assert "&lt;script&gt;" in dom  # shown
    assert "owned" not in dom
