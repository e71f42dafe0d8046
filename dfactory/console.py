"""A Console with markup, emoji and highlighting off, so that text from models, records and paths prints literally."""

from rich.console import Console


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to `cli.main`; rich would end the program with status 1."""
        raise


def plain_console(**options) -> Console:
    """A rich Console that prints text literally. For styled text print a rich.text.Text."""
    return _Console(highlight=False, markup=False, emoji=False, **options)
