"""SIGTERM and SIGUSR1: finish the step, save on all ranks, leave with status 75 so that the scheduler starts us again."""

import signal

EXIT_PREEMPTED = 75


class Preemption:
    """Remembers that a signal came. A second one ends the process at once."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number, frame) -> None:
        self.requested = True
        signal.signal(number, signal.SIG_DFL)
