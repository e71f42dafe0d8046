"""A reward that fails when it is told to: the file `reward` beside this one names how, and is taken away. `always` stays."""

import os
import signal
import time
from pathlib import Path

ORDER = Path(__file__).parent / "reward"


def ordered(prompts, completions, completion_ids, **columns):
    """Short is good, and a letter of the first half of the alphabet: most groups have a signal."""
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
    texts = [completion[0]["content"] for completion in completions]
    return [
        sum(letter < "N" for letter in text) - 0.1 * len(ids) for text, ids in zip(texts, completion_ids, strict=True)
    ]


def take() -> str | None:
    if not ORDER.exists():
        return None
    how = ORDER.read_text()
    if how != "always":
        ORDER.unlink(missing_ok=True)
    return how
