"""A Console with markup, emoji and highlighting off, so that text from models, records and paths prints literally."""

from rich.console import Console
from rich.text import Text

NARROWEST = 24  # columns of text beside a name; in a narrower terminal lines are longer than it


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to `cli.main`; rich would end the program with status 1."""
        raise


def plain_console(**options) -> Console:
    """A rich Console that prints text literally. For styled text print a rich.text.Text."""
    return _Console(highlight=False, markup=False, emoji=False, **options)


def print_hanging(console: Console, lead: Text, body: Text) -> None:
    """`lead`, and to its right `body`, broken between words alone: a path longer than a line stays whole, to be copied."""
    room = max(console.width - lead.cell_len, NARROWEST)
    for paragraph in body.split("\n"):
        line = Text()
        for word in paragraph.split(" "):
            if line and line.cell_len + 1 + word.cell_len > room:
                console.print(Text.assemble(lead, line), soft_wrap=True)
                lead, line = Text(" " * lead.cell_len), word
            else:
                line = Text.assemble(line, " ", word) if line else word
        console.print(Text.assemble(lead, line), soft_wrap=True)
        lead = Text(" " * lead.cell_len)
