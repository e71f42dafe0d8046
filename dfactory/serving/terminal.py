"""A conversation in the terminal, with the answer's denoising live; without a terminal, plain lines.

Lines that begin with / change how it decodes, also while an answer is on its way: keys are read between two forwards.
"""

import contextlib
import os
import select
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from dfactory.decoding.keys import valid_keys
from dfactory.decoding.response import document_length
from dfactory.denoising import MASK, Frame, Run, State, printable
from dfactory.errors import ConfigError, DataError
from dfactory.inference import Pipeline, Stream
from dfactory.serving.trace import Turn, write_trace
from dfactory.types import Answer

HELP = """\
/{dial:24}from now on; in this way any decode key: /rule NAME,
                         /editing_threshold 0.5, /temperature 1, /max_new_tokens 64
/delay 0.2               seconds to wait after each forward, to watch a fast model
/keys                    the values of all of them
/new                     forget the conversation
/help  /quit             Ctrl-C ends an answer, Ctrl-D the conversation"""
FIXED = ("block_size", "batch_size", "mask_token_id", "eos_token_id", "full_attention")
LINES_BESIDE = 5  # of the screen, that are not the answer's
GLANCE_S = 0.1  # between two looks for Ctrl-C
STYLES = {
    State.MASKED: "bright_black",
    State.DRAFTED: "italic magenta",
    State.COMMITTED: "",
    State.FRESH: "bold green",
    State.EDITED: "underline yellow",
}


class Chat:
    """`run` talks until the input ends."""

    def __init__(self, pipeline: Pipeline, console: Console, *, trace: Path | None = None, delay: float = 0.0):
        self.pipeline, self.console = pipeline, console
        self.trace, self.delay = trace, delay
        self.messages: list[dict[str, str]] = []
        self.turns: list[Turn] = []
        self.note = ""  # about the last command

    def run(self) -> None:
        live = self.console.is_terminal
        if live:
            self.console.print(Text("/help for commands. ") + legend())
        while (line := self._read_line()) is not None:
            if line.startswith("/"):
                if line.split()[0] in ("/quit", "/exit"):
                    return
                self._command(line)
                self.console.print(self.note, style="dim", markup=False)
            elif line.strip():
                self._answer(line)

    def _read_line(self) -> str | None:
        try:
            if self.console.is_terminal and sys.stdin.isatty():
                return input("> ")
            line = sys.stdin.readline()
        except EOFError:
            return None
        except KeyboardInterrupt:
            return ""
        return line.rstrip("\n") if line else None

    # --- commands ---------------------------------------------------------------------------------------------------

    def _command(self, line: str) -> None:
        name, _, value = line[1:].strip().partition(" ")
        if name == "help":
            self.note = HELP.format(dial=self.pipeline.rules.rule.shown)
        elif name == "keys":
            values = valid_keys(self.pipeline.keys).items()
            self.note = ", ".join(f"{name} {'off' if value is None else value}" for name, value in values)
        elif name == "new":
            self.messages = []
            self.note = "a new conversation"
        else:
            self._set(name, value.strip())

    def _set(self, name: str, value: str) -> None:
        try:
            parsed = None if value in ("off", "null") else yaml.safe_load(value)
            if name == "delay":
                self.delay = min(max(float(value), 0.0), 10.0)
            elif name in FIXED:
                raise ConfigError(f"{name} cannot change in a conversation: start another with decode.{name}={value}")
            else:
                self.pipeline = self.pipeline.over({name: parsed}, f"/{name}")
        except (ConfigError, yaml.YAMLError, ValueError) as problem:
            self.note = printable(str(problem))
        else:
            self.note = f"{name} {printable(value)}"

    # --- one turn ---------------------------------------------------------------------------------------------------

    def _answer(self, question: str) -> None:
        messages = [*self.messages, {"role": "user", "content": question}]
        started = time.perf_counter()
        try:
            stream = self.pipeline.stream(self._encode(messages), noise_id=len(self.turns))
        except (DataError, ConfigError) as problem:
            self.console.print(str(problem), style="red", markup=False)
            return
        frames: list[Frame] = []
        answer = self._decode(stream, frames)
        seconds = time.perf_counter() - started
        self.turns.append(Turn(question, frames))
        if answer is not None:
            self.messages = [*messages, {"role": "assistant", "content": answer.text}]
            self.console.print(printable(answer.text), markup=False, soft_wrap=True)
            if self.console.is_terminal and not answer.text:
                later = "; trained on single turns? /new forgets the ones before" if len(messages) > 1 else ""
                self.console.print(f"(an empty answer{later})", style="dim")
        if self.console.is_terminal and frames:
            self.console.print(_counts(answer, frames[-1], seconds), style="dim")
        if self.trace is not None:
            write_trace(self.trace, self.turns)

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids of the conversation. Raises DataError where it is too long, ConfigError without a chat template."""
        prompt, rules = self.pipeline.encode_chat(messages), self.pipeline.rules
        most = self.pipeline.policy.config.max_position_embeddings
        if document_length(len(prompt), rules) > most:
            raise DataError(
                f"the conversation has {len(prompt)} tokens, with max_new_tokens {rules.max_new_tokens} more than the "
                f"model's {most}: /new forgets it"
            )
        return prompt

    def _decode(self, stream: Stream, frames: list[Frame]) -> Answer | None:
        """The answer; None where Ctrl-C ended it. `frames` gets what there was to see."""
        with interrupts() as interrupted, self._screen(interrupted) as (show, typed):
            while not interrupted():
                frame = next(stream)
                frames.append(frame)
                show(frame)
                if frame.answer is not None:
                    return frame.answer
                for line in typed(self.delay):
                    self._command(line)
                    stream.go_on_with(self.pipeline)
                    show(frame)
        return None

    @contextlib.contextmanager
    def _screen(self, interrupted: Callable[[], bool]) -> Iterator[tuple]:
        """(show a frame, lines that were typed since); both do nothing where there is no terminal."""
        if not self.console.is_terminal:
            yield lambda frame: None, lambda delay: ()
            return
        keyboard = Keyboard()
        with keyboard.watched(), Live(console=self.console, transient=True, auto_refresh=False) as live:

            def show(frame: Frame) -> None:
                live.update(self._picture(frame, keyboard.line), refresh=True)

            def typed(delay: float) -> list[str]:
                lines, before = [], keyboard.line
                ends = time.monotonic() + delay
                while True:
                    lines += keyboard.read(min(GLANCE_S, max(0.0, ends - time.monotonic())))
                    if keyboard.line != before:
                        live.update(self._picture(self._last_frame, keyboard.line), refresh=True)
                        before = keyboard.line
                    if lines or interrupted() or time.monotonic() >= ends:
                        return lines

            yield show, typed

    def _picture(self, frame: Frame, line: str) -> Group:
        """The end of the answer, as far as the screen goes; below, where it stands and what is being typed."""
        self._last_frame = frame
        rows = styled(frame).wrap(self.console, self.console.width)[-max(1, self.console.height - LINES_BESIDE) :]
        status = f"{frame.rate}, {self.pipeline.rules.rule.shown}"
        if self.pipeline.keys.editing_threshold is not None:
            status += f", editing {self.pipeline.keys.editing_threshold:g}"
        note = [Text(self.note, "dim")] if self.note and line == "" else []
        return Group(Text("\n").join(rows), Text(status, "dim"), *note, Text(f"> {line}" if line else "", "bold"))


def styled(frame: Frame) -> Text:
    return Text.assemble(*((run.marked, STYLES[run.state]) for run in frame.runs))


def legend() -> Text:
    examples = [Run(State.MASKED, MASK * 2), Run(State.DRAFTED, "drafted"), Run(State.FRESH, "new")]
    examples += [Run(State.COMMITTED, "committed"), Run(State.EDITED, "edited")]
    named = {State.MASKED: " masked"}
    parts = (Text(run.marked, STYLES[run.state]) + Text(named.get(run.state, "")) for run in examples)
    return Text("   ").join(parts)


def _counts(answer: Answer | None, last: Frame, seconds: float) -> str:
    """Of an answer up to EOS, as `eval` counts; of one that was interrupted, what stands there."""
    if answer is None:
        return f"interrupted at {last.rate}"
    tokens, rate = len(answer.token_ids), answer.tokens_per_forward
    counted = f"{answer.forwards} forward{'s' * (answer.forwards != 1)}, {tokens} token{'s' * (tokens != 1)}"
    return f"{counted}, {rate:.2f} a forward, {tokens / seconds:,.0f} a second"


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Tells whether Ctrl-C was pressed. An exception in the midst of a forward might end in code that swallows it."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # which alone may listen to signals
        yield pressed.is_set
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.set())
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


class Keyboard:
    """What is typed while the screen is drawn: read without waiting for the end of a line, and without the terminal's
    own echo."""

    def __init__(self):
        self.line = ""

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        if not sys.stdin.isatty():
            yield
            return
        before = termios.tcgetattr(sys.stdin)
        tty.setcbreak(sys.stdin)  # Ctrl-C still interrupts
        try:
            yield
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)

    def read(self, wait_s: float) -> list[str]:
        """Lines that were completed within `wait_s`; returns as soon as something is typed."""
        if not sys.stdin.isatty():
            time.sleep(wait_s)
            return []
        if not select.select([sys.stdin], [], [], wait_s)[0]:
            return []
        lines = []
        for character in os.read(sys.stdin.fileno(), 1024).decode(errors="ignore"):
            if character in "\r\n":
                lines.append(self.line)
                self.line = ""
            elif character in "\x7f\b":
                self.line = self.line[:-1]
            elif character.isprintable():
                self.line += character
        return [line for line in lines if line.startswith("/")]
