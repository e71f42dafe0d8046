"""An animation of how answers came to be, in one file: HTML that can be stopped and stepped through, or a GIF."""

import html
import json
import re
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from dfactory.denoising import Frame, State
from dfactory.errors import ConfigError

FORMATS = (".html", ".gif")
COLUMNS, ROWS = 80, 24  # of a GIF
FRAME_MS, PAUSE_MS = 150, 2000  # of a GIF: a forward, and the end of an answer
FONT_SIZE, LINE_HEIGHT, MARGIN = 15, 20, 12
PAPER, INK, FAINT = (250, 250, 248), (30, 30, 30), (110, 110, 110)
INKS = {
    State.MASKED: (190, 190, 190),
    State.DRAFTED: (150, 60, 160),
    State.COMMITTED: INK,
    State.FRESH: (0, 120, 60),
    State.EDITED: (190, 90, 0),
}


class Turn(NamedTuple):
    question: str
    frames: list[Frame]


def check_trace_path(path: Path) -> None:
    """Raises ConfigError where no trace can be written, before anything is decoded."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"--trace {path}: it must end in {' or '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--trace {path}: the folder {path.parent} does not exist: make it")


def write_trace(path: Path, turns: list[Turn]) -> None:
    """Write the animation of all turns; a file that is there is replaced when the new one is complete."""
    partial = path.with_name(f".{path.name}.partial")
    if path.suffix == ".gif":
        _write_gif(partial, turns)
    else:
        partial.write_text(_page(turns), encoding="utf-8", errors="replace")  # half characters have no bytes
    partial.replace(path)


def _page(turns: list[Turn]) -> str:
    """The player in assets/trace.html with the frames in it. What a model wrote is data there, never markup."""
    frames = [
        {
            "question": turn.question,
            "turn": number,
            "status": _status(frame),
            "runs": [[run.state.value, run.marked] for run in frame.runs],
        }
        for number, turn in enumerate(turns, start=1)
        for frame in turn.frames
    ]
    data = json.dumps(frames, ensure_ascii=False).replace("<", "\\u003c")  # no </script> inside a script
    parts = {"TITLE": html.escape(turns[-1].question[:80]), "FRAMES": data}
    page = resources.files("dfactory").joinpath("assets/trace.html").read_text(encoding="utf-8")
    return re.sub("TITLE|FRAMES", lambda found: parts[found.group()], page)  # in one go: a part may hold such a word


def _status(frame: Frame) -> str:
    return f"{frame.rate}, {frame.rule}"


def _write_gif(path: Path, turns: list[Turn]) -> None:
    # imported here: HTML traces do without both
    import matplotlib
    from PIL import ImageFont

    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSansMono.ttf", FONT_SIZE)
    rows = min(ROWS, 3 + max(len(_lines(frame)) for turn in turns for frame in turn.frames))
    pictures, milliseconds = [], []
    for turn in turns:
        for frame in turn.frames:
            pictures.append(_picture(turn.question, frame, font, rows))
            milliseconds.append(FRAME_MS)
        milliseconds[-1] = PAUSE_MS
    first, *others = pictures
    first.save(path, "gif", save_all=True, append_images=others, duration=milliseconds, loop=0, optimize=False)


def _picture(question: str, frame: Frame, font, rows: int):
    from PIL import Image, ImageDraw

    width = round(font.getlength("M") * COLUMNS) + 2 * MARGIN
    image = Image.new("RGB", (width, rows * LINE_HEIGHT + 2 * MARGIN), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, MARGIN), f"> {question.splitlines()[0]}"[:COLUMNS], INK, font)
    for row, line in enumerate(_lines(frame)[-(rows - 3) :], start=1):
        x, y = MARGIN, MARGIN + row * LINE_HEIGHT
        for state, text in line:
            draw.text((x, y), text, INKS[state], font)
            length = font.getlength(text)
            if state == State.EDITED:
                draw.line((x, y + LINE_HEIGHT - 3, x + length, y + LINE_HEIGHT - 3), INKS[state])
            x += length
    draw.text((MARGIN, MARGIN + (rows - 1) * LINE_HEIGHT), _status(frame), FAINT, font)
    return image.quantize(32)


def _lines(frame: Frame) -> list[list[tuple[State, str]]]:
    """The runs broken into lines of COLUMNS characters."""
    lines, room = [[]], COLUMNS
    for run in frame.runs:
        for number, part in enumerate(run.marked.split("\n")):
            if number:
                lines.append([])
                room = COLUMNS
            while part:
                if not room:
                    lines.append([])
                    room = COLUMNS
                lines[-1].append((run.state, part[:room]))
                room, part = room - len(part[:room]), part[room:]
    return lines
