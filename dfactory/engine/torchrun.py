"""torchrun for runs that are preempted: `python -m dfactory.engine.torchrun`, with the words of torchrun.

torchrun itself passes SIGTERM on and kills who has not ended half a minute later, dies of SIGUSR1 and leaves its workers
behind, and ends with 1 whatever they ended with. This one tells the workers, waits as long as saving takes, and ends with
their status: 75 where a rank was preempted, or else that of the first one that failed.
"""

import os
import signal
import sys
import threading

import psutil
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from dfactory.engine.preemption import EXIT_PREEMPTED, SIGNALS, TOLD

AGAIN_S = 1.0  # between two words to the workers: one that is still starting does not hear the first


class Agent:
    """This process, which starts one worker a rank and waits for them."""

    def __init__(self):
        self.told = threading.Event()
        signal.signal(TOLD, signal.SIG_IGN)  # also in workers, until they listen
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        threading.Thread(target=self._tell_workers, daemon=True).start()

    def run(self, words: list[str]) -> int:
        arguments = torchrun.parse_args(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *words])
        try:
            torchrun.run(arguments)
        except ChildFailedError as failure:
            print(failure, file=sys.stderr)
            return exit_status([worker.exitcode for worker in failure.failures.values()])
        return 0

    def _on_signal(self, number: int, frame) -> None:
        workers = psutil.Process().children()
        if not self.told.is_set():
            self.told.set()
        elif not any(_has_saved(worker.pid) for worker in workers):  # else it is over: srun ends us after another node
            for worker in workers:
                worker.kill()
            os._exit(128 + number)

    def _tell_workers(self) -> None:
        self.told.wait()
        while True:
            for worker in psutil.Process().children():
                worker.send_signal(TOLD)  # psutil asks whether it is still the same process
            threading.Event().wait(AGAIN_S)


def _has_saved(pid: int) -> bool:
    """Whether a child has ended with 75; torchrun is still to learn that, so the child stays as it is."""
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return ended is not None and ended.si_code == os.CLD_EXITED and ended.si_status == EXIT_PREEMPTED


def exit_status(codes: list[int]) -> int:
    """Of workers that ended with `codes`, negative for a signal.

    A rank ends with 75 only when all have saved; torchrun then ends those that are still leaving. And when one rank fails,
    torchrun ends the others: a status of its own tells more than the signal.

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
