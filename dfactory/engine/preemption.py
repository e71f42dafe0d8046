"""SIGTERM and SIGUSR1: finish the step, save on all ranks, leave with status 75 so that the scheduler starts us again.

A scheduler may signal a launcher, one rank, or every process. A launcher passes its signal on as TOLD, which may come any
number of times, so that who got both does not take the second for an order to end at once.
"""

import signal

EXIT_PREEMPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
TOLD = signal.SIGUSR2


class Preemption:
    """Remembers that a signal came. A second one of SIGNALS ends the process at once."""

    def __init__(self):
        self.requested = False
        for number in SIGNALS:
            signal.signal(number, self._remember)
        signal.signal(TOLD, self._hear)

    def leave(self) -> None:
        """All have saved. A signal must not spoil the exit status now."""
        for number in (*SIGNALS, TOLD):
            signal.signal(number, signal.SIG_IGN)

    def _remember(self, number, frame) -> None:
        self.requested = True
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    def _hear(self, number, frame) -> None:
        self.requested = True
