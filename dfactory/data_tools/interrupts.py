"""What long verbs do when they are interrupted: they keep what is done, and the same command goes on."""

import contextlib
import os
import signal
from collections.abc import Iterator

EXIT_INTERRUPTED = 130
EXIT_TERMINATED = os.EX_TEMPFAIL  # 75, as after a saved checkpoint: run the same command again


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises Terminated meanwhile."""

    def terminate(number, frame) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def status_of(interrupt: KeyboardInterrupt) -> int:
    return EXIT_TERMINATED if isinstance(interrupt, Terminated) else EXIT_INTERRUPTED
