"""Runs the Python blocks of docs/tutorial.md in one session; `python -m tests.tutorial` writes what they print."""

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"
STEP = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<stated>.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def run(text: str) -> Iterator[tuple[re.Match, str]]:
    """Each Python block, with the text block below it if there is one, and what it prints."""
    session: dict = {"__name__": "tutorial"}
    for step in STEP.finditer(text):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(step["code"], str(PAGE), "exec"), session)
        yield step, "".join(line.rstrip() + "\n" for line in out.getvalue().splitlines())


def main() -> int:
    text, written, end = PAGE.read_text(), "", 0
    for step, printed in run(text):
        shown = f"\n```text\n{printed}```\n" if printed else ""
        written += text[end : step.start()] + f"```python\n{step['code']}```\n{shown}"
        end = step.end()
    PAGE.write_text(written + text[end:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
