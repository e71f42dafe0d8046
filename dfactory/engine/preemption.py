"""SIGTERM and SIGUSR1: finish the step, save on all ranks, exit with status 75 so that the scheduler starts the run again.

A scheduler may signal a launcher, one rank, or every process. A launcher forwards its signal as FORWARDED, which may
arrive any number of times. So a rank that gets the scheduler's signal and the forwarded one does not mistake the second
for a request to end at once.
"""

import signal

EXIT_PREEMPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
FORWARDED = signal.SIGUSR2


class Preemption:
    """Remembers that a signal came. A second signal out of SIGNALS ends the process at once."""

    def __init__(self):
        self.requested = False
        for number in SIGNALS:
            signal.signal(number, self._remember)
        signal.signal(FORWARDED, self._on_forwarded)

    def leave(self) -> None:
        """Ignore further signals: all ranks have saved, and the exit status must stay 75."""
        for number in (*SIGNALS, FORWARDED):
            signal.signal(number, signal.SIG_IGN)

    def _remember(self, number, frame) -> None:
        self.requested = True
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    def _on_forwarded(self, number, frame) -> None:
        self.requested = True
