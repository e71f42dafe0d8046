"""torchrun for runs that are preempted: `python -m dfactory.engine.torchrun`, with torchrun's arguments.

torchrun itself forwards SIGTERM and kills the workers that have not ended 30 seconds later. SIGUSR1 kills it and leaves
its workers running. Its exit status is 1 whatever theirs was. This launcher forwards the signal, waits as long as saving
takes, and exits with the workers' status: 75 if a rank was preempted, else that of the first one that failed.
"""

import os
import signal
import sys
import threading

import psutil
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from dfactory.engine.preemption import EXIT_PREEMPTED, FORWARDED, SIGNALS

REPEAT_S = 1.0  # between two signals to the workers: one that is still starting misses the first


class Agent:
    """This process: it starts one worker per rank and waits for them."""

    def __init__(self):
        self.preempted = threading.Event()
        signal.signal(FORWARDED, signal.SIG_IGN)  # workers inherit this until they install their own handler
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        threading.Thread(target=self._forward, daemon=True).start()

    def run(self, argv: list[str]) -> int:
        arguments = torchrun.parse_args(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *argv])
        try:
            torchrun.run(arguments)
        except ChildFailedError as failure:
            print(failure, file=sys.stderr)
            return exit_status([worker.exitcode for worker in failure.failures.values()])
        return 0

    def _on_signal(self, number: int, frame) -> None:
        workers = psutil.Process().children()
        if not self.preempted.is_set():
            self.preempted.set()
        elif not any(_has_saved(worker.pid) for worker in workers):  # else ignore it: srun signals us when a node ends
            for worker in workers:
                worker.kill()
            os._exit(128 + number)

    def _forward(self) -> None:
        self.preempted.wait()
        while True:
            for worker in psutil.Process().children():
                worker.send_signal(FORWARDED)  # psutil checks that the pid is still the same process
            threading.Event().wait(REPEAT_S)


def _has_saved(pid: int) -> bool:
    """Whether a child has ended with 75. The child is not reaped, because torchrun still has to read its status."""
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return ended is not None and ended.si_code == os.CLD_EXITED and ended.si_status == EXIT_PREEMPTED


def exit_status(codes: list[int]) -> int:
    """The exit status for workers that ended with `codes`; a negative code is a signal.

    A rank exits with 75 only when all have saved; torchrun then ends those that are still exiting. When one rank fails,
    torchrun ends the others too, so a worker's own status says more than a signal.

    >>> exit_status([-15, 75]), exit_status([-15, 2]), exit_status([-9]), exit_status([-9, -15])
    (75, 2, 137, 137)
    """
    if EXIT_PREEMPTED in codes:
        return EXIT_PREEMPTED
    if own := [code for code in codes if code > 0]:
        return own[0]
    signals = [-code for code in codes]
    return 128 + next((number for number in signals if number != signal.SIGTERM), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(Agent().run(sys.argv[1:]))
