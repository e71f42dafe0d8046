"""Imports without the garbage collector, with nothing but Python's own library."""

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def importing(module: str) -> Iterator[None]:
    """A context in which a command imports `module` for the first time, with what it needs.

    Libraries make a million objects that stay. Looking through them for garbage again and again takes a quarter of the
    import's time, and of the time of what follows, so the collector pauses here and leaves them out from then on.
    """
    if module in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
