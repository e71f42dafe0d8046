"""Consoles that print a text as it is: what a model, a record or a path says in brackets is no markup of rich's, and a
closing one no error; what it says between colons no emoji."""

from rich.console import Console


def plain_console(**options) -> Console:
    """A rich Console; markup belongs into a rich.text.Text."""
    return Console(highlight=False, markup=False, emoji=False, **options)
