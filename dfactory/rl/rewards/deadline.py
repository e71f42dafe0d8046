"""A bound on what a reward computes from text that a model wrote: what takes longer is a wrong answer, not a missing one."""

import signal
import threading
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")
AGAIN_S = 0.05  # between two signals: a library may catch the first


class _OutOfTime(BaseException):
    """No Exception: libraries catch those."""


def within(seconds: float, function: Callable[..., Value], *arguments, late: Value) -> Value:
    """function(*arguments), or `late` where it takes more than `seconds` of CPU time.

    CPU time, so that a busy machine does not change a score. The timer is a signal, which Python handles in its main thread
    only, as in reward processes; in another thread the function runs without a bound.
    """
    if threading.current_thread() is not threading.main_thread():
        return function(*arguments)
    running = True

    def ring(*_) -> None:
        if running:
            raise _OutOfTime

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds, AGAIN_S)
    try:
        value = function(*arguments)
        running = False
        return value
    except _OutOfTime:
        return late
    finally:
        running = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
