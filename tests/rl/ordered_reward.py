"""A reward that fails when it is told to: the file `reward` beside this one names how, and is taken away. `always` stays."""

import os
import random
import signal
import time
from pathlib import Path

ORDER = Path(__file__).parent / "reward"


def ordered(prompts, completions, completion_ids, **columns):
    """By chance, so that every group has a signal: what can be learnt would be, and end a long run."""
    how = take()
    if how == "hang":
        time.sleep(1000)
    if how in ("raise", "always"):
        raise ValueError("poisoned")
    if how == "die":
        os._exit(3)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "nan":
        return [float("nan")] * len(completions)
    return [random.random() for _ in completions]


def take() -> str | None:
    if not ORDER.exists():
        return None
    how = ORDER.read_text()
    if how != "always":
        ORDER.unlink(missing_ok=True)
    return how
