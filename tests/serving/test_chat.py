"""The chat in a real pseudo-terminal, without a terminal, and the animations that it writes."""

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import sys
import time

import pytest
from PIL import Image

from dfactory.cli import main
from dfactory.decoding import Progress
from dfactory.denoising import END, Denoising, Frame, Run, State, printable
from dfactory.inference import Pipeline
from dfactory.serving.terminal import legend, styled
from dfactory.serving.trace import Turn, write_trace
from tests.serving.conftest import MODEL, ROOT, STARTS_WITHIN_S

CHAT = (sys.executable, "-m", "dfactory.cli", "chat", *MODEL, "decode.block_size=8", "decode.max_new_tokens=24")
RULE = "threshold 0.9"
ESCAPE = re.compile(r"\x1b\[[?\d;]*[A-Za-z]")


class Terminal:
    """A child process behind a pseudo-terminal."""

    def __init__(self, *words: str):
        self.child, self.descriptor = pty.fork()
        if self.child == 0:
            os.chdir(ROOT)
            os.environ |= {"OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
            os.execv(sys.executable, [*CHAT, *words])
        self.seen = ""

    def expect(self, pattern: str) -> str:
        """Read until the pattern comes; what was read up to it is taken away."""
        ends = time.monotonic() + STARTS_WITHIN_S
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < ends, f"{pattern} did not come: {self.seen[-2000:]!r}"
            if select.select([self.descriptor], [], [], 0.2)[0]:
                self.seen += ESCAPE.sub("", os.read(self.descriptor, 65536).decode(errors="replace"))
        before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return before

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def close(self) -> int:
        """The exit status, killed if it does not end."""
        ends = time.monotonic() + 60
        while time.monotonic() < ends:
            if select.select([self.descriptor], [], [], 0.05)[0]:
                try:
                    os.read(self.descriptor, 65536)
                except OSError:
                    break
        else:
            os.kill(self.child, signal.SIGKILL)
        os.close(self.descriptor)
        return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])


@pytest.fixture
def terminal(tmp_path):
    """A chat that writes a trace; whatever the test finds, its process is gone afterwards."""
    opened = Terminal("--delay", "0.5", "--trace", str(tmp_path / "trace.html"), "decode.threshold=1.0")
    yield opened
    with contextlib.suppress(ProcessLookupError):
        os.kill(opened.child, signal.SIGKILL)


@pytest.mark.slow
def test_a_conversation_in_a_terminal(terminal, tmp_path):
    """Threshold 1 would take 24 forwards of 0.5 s; it is lowered meanwhile, and the answer ends early."""
    trace = tmp_path / "trace.html"
    terminal.expect("masked.*drafted.*new.*committed.*edited")
    terminal.expect("> ")
    terminal.type("hello there\n")
    assert "█" in terminal.expect("forward 2, 2 tokens, 1.00 a forward, threshold 1")
    terminal.type("/thresh")
    terminal.expect("> /thresh")
    terminal.type("x\x7fold 0.0\n")
    terminal.expect("threshold 0.0")
    told = terminal.expect(r"(\d+) forwards, 24 tokens, [\d.]+ a forward")
    assert int(re.search(r"(\d+) forwards", told).group(1)) < 20
    terminal.expect("> ")
    terminal.type("/threshold 1.0\n")
    terminal.type("again\n")
    terminal.expect("forward 1, ")
    terminal.type("\x03")
    terminal.expect("interrupted at forward")
    terminal.type("/treshold 1\n")
    terminal.expect("did you mean threshold")
    terminal.type("\x04")
    assert terminal.close() == 0
    page = trace.read_text()
    assert "hello there" in page
    assert "again" in page


def test_plain_lines_without_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/threshold 0.001\n\nhello again\n/quit\nnever\n"))
    assert main(["chat", *MODEL, "decode.block_size=8", "decode.max_new_tokens=24"]) == 0
    told = capsys.readouterr().out
    assert "\x1b" not in told
    first, changed, *second = told.splitlines()
    assert changed == "threshold 0.001"
    assert first
    assert second


def test_another_rule_in_a_conversation(monkeypatch, capsys):
    lines = "/rule entropy_bound\n/threshold 0.5\n/entropy_bound 100\n/keys\n/help\nhello\n/quit\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    words = ["decode.block_size=8", "decode.max_new_tokens=24", "decode.threshold=0.9"]
    assert main(["chat", *MODEL, *words]) == 0
    told = " ".join(capsys.readouterr().out.split())  # a line is broken where the terminal ends
    assert told.startswith("rule entropy_bound threshold in /threshold belongs to decode.rule threshold, and this is ")
    assert "entropy_bound 100 block_size 8, " in told
    assert "min_commit" not in told
    assert "/entropy_bound 100 from now on" in told


@pytest.mark.parametrize(
    "words, message",
    [
        (["--trace", "film.mp4"], "--trace film.mp4: it must end in .html or .gif"),
        (["--trace", "nowhere/film.gif"], "the folder nowhere does not exist"),
        (["decode.treshold=1"], "did you mean threshold?"),
    ],
)
def test_options_that_cannot_be(capsys, words, message):
    assert main(["chat", *MODEL, *words]) == 2
    assert message in capsys.readouterr().err


# --- frames ------------------------------------------------------------------------------------------------------------


def progress_of(pipeline, tokens: str, drafts: str, sure: float = -0.1, **fields) -> Progress:
    """`_` is a mask; other characters are encoded one by one."""
    special, encode = pipeline.vocabulary.special, pipeline.vocabulary.encoder.encode_text

    def ids(text: str) -> list[int]:
        return [special.mask if c == "_" else special.eos if c == "$" else encode(c)[0] for c in text]

    logprobs = [sure if c == "_" else 0.0 for c in tokens]
    fields = {"prompt": 0, "forwards": 1, "settled": 0, "rollout": None} | fields
    return Progress(token_ids=ids(tokens), draft_ids=ids(drafts), draft_logprobs=logprobs, **fields)


def test_states_of_tokens(pipeline):
    denoising = Denoising(pipeline.vocabulary, 4)
    first = denoising.frame(progress_of(pipeline, "a__d", "abcd"), RULE)
    assert first.runs == ((State.FRESH, "a"), (State.DRAFTED, "bc"), (State.FRESH, "d"))
    assert first.marked == styled(first).plain == "a⟨bc⟩d"
    unsure = Denoising(pipeline.vocabulary, 4).frame(progress_of(pipeline, "a__d", "abcd", sure=-9.0), RULE)
    assert unsure.marked == "a██d"
    second = denoising.frame(progress_of(pipeline, "ab_x", "abcx", forwards=2), RULE)
    assert second.marked == "ab⟨c⟩~x~"
    assert [run.state for run in second.runs] == ["committed", "fresh", "drafted", "edited"]
    last = denoising.frame(progress_of(pipeline, "abcx", "abcx", forwards=3, settled=4), RULE)
    assert last.marked == "abc~x~████"  # and the block that comes next
    assert last.rate == "forward 3, 4 tokens, 1.33 a forward"


def test_every_state_has_a_mark_of_its_own():
    shown = {Run(state, "x" if state != State.MASKED else "█").marked for state in State if state != State.FRESH}
    assert len(shown) == len(State) - 1
    assert all(name in legend().plain for name in ("masked", "drafted", "committed", "edited"))


def test_ends_and_control_characters(pipeline):
    assert printable("a\x1b[31mb\x9bc\td\ne\x00") == "a�[31mb�c d\ne�"
    frame = Denoising(pipeline.vocabulary, 4).frame(progress_of(pipeline, "a$$$", "a$$$"), RULE)
    assert frame.marked == f"a{END * 3}"


def turn_of(pipeline: Pipeline, question: str) -> Turn:
    return Turn(question, list(pipeline.stream([{"role": "user", "content": question}])))


def test_a_page_holds_every_frame_and_no_markup_of_the_model(pipeline, tmp_path):
    turn = turn_of(pipeline, "</script><b>hi & you")
    evil = Frame(99, 1, RULE, (Run(State.COMMITTED, "</script><script>alert(1)"),))
    write_trace(tmp_path / "trace.html", [turn, Turn("TITLE FRAMES", [evil])])
    page = (tmp_path / "trace.html").read_text()
    assert page.count("</script>") == 1
    assert "http" not in page.replace("http-equiv", "")
    frames = json.loads(re.search(r"const frames = (.*);\n", page).group(1))
    assert len(frames) == len(turn.frames) + 1
    assert "".join(text for _, text in frames[-2]["runs"]) == turn.frames[-1].marked
    assert frames[-1]["runs"][0][1] == "</script><script>alert(1)"
    assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob(".*.partial"))


def test_a_gif_has_a_picture_a_forward(pipeline, tmp_path):
    turn = turn_of(pipeline, "hello")
    write_trace(tmp_path / "trace.gif", [turn])
    with Image.open(tmp_path / "trace.gif") as picture:
        assert 1 < picture.n_frames <= len(turn.frames)  # equal neighbours are joined
        assert picture.size[0] > 500
