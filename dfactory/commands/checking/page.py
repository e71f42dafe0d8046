"""Where the sections of a dry run print, and what they find wrong."""

from collections.abc import Callable, Iterable
from typing import Any

from rich.table import Table
from rich.text import Text

from dfactory.console import plain_console, print_hanging
from dfactory.errors import DFactoryError
from dfactory.redaction import redact

PLAIN_WIDTH = 120  # of the output where there is no terminal
NAME_WIDTH = 18  # of a line's name, with the space after it


class Page:
    """Where sections print, and what they find wrong."""

    def __init__(self):
        self.console = plain_console()
        if not self.console.is_terminal:
            self.console.width = PLAIN_WIDTH
        self.problems: list[DFactoryError] = []
        self.warnings: list[str] = []

    def section(self, title: str, tell: Callable[..., Any], *arguments: Any) -> Any:
        """Run one section; None where it fails."""
        self.console.rule(Text(title, "bold"), align="left", style="dim")
        try:
            return tell(self, *arguments)
        except DFactoryError as problem:
            self.problem(problem)
            return None

    def problem(self, problem: DFactoryError) -> None:
        self.problems.append(problem)
        self.console.print(Text.assemble(("error: ", "bold red"), str(problem)), soft_wrap=True)

    def line(self, name: str, *parts: Any) -> None:
        """`name   text`, the texts of a section under each other. Secrets in strings are hidden."""
        lead = named(name)
        for part in parts:
            if isinstance(part, str):
                self.hang(lead, Text(redact(part)))
            else:
                grid = Table.grid()
                grid.add_column(width=NAME_WIDTH)
                grid.add_column(overflow="fold")
                grid.add_row(lead, part)
                self.console.print(grid)
            lead = named("")

    def hang(self, lead: Text, body: Text) -> None:
        print_hanging(self.console, lead, body)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def verdict(self) -> int:
        self.console.rule(style="dim")
        for warning in self.warnings:
            self.console.print(Text.assemble(("warning: ", "bold yellow"), warning), soft_wrap=True)
        if self.problems:
            count = f"{len(self.problems)} error{'s' * (len(self.problems) > 1)}"
            self.console.print(Text(f"{count}: training would not start", "bold red"))
            return self.problems[0].exit_status
        self.console.print(Text("training would start", "bold green"))
        return 0


def named(name: str) -> Text:
    """What stands to the left of a line's text."""
    return Text(name.ljust(NAME_WIDTH), "dim")


def right_aligned(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    table = Table(*columns, box=None, padding=(0, 2))
    for column in table.columns:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    return table


def in_bytes(count: float) -> str:
    unit, size = ("GB", 1e9) if count >= 1e9 else ("MB", 1e6)
    return f"{count / size:,.{0 if count >= 100 * size else 1}f} {unit}"


def in_short(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:,.2f}{unit}"
    return str(number)
