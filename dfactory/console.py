"""A Console with markup, emoji and highlighting off, so that text from models, records and paths prints literally."""

from rich.console import Console


def plain_console(**options) -> Console:
    """A rich Console that prints text literally. For styled text print a rich.text.Text."""
    return Console(highlight=False, markup=False, emoji=False, **options)
