"""Reward functions as users write them on a bad day. Each looks at the completion for what to do."""

import os
import signal
import subprocess
import sys
import time

PLENTY = []


def good(prompts, completions, **columns):
    return [float(len(completion)) for completion in completions]


def moody(prompts, completions, **columns):
    """Does what the first completion says; scores 1 otherwise."""
    {
        "hang": lambda: time.sleep(1000),
        "spin": spin,
        "deaf": deaf,
        "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
        "raise": lambda: 1 / 0,
        "exit": lambda: sys.exit(0),
        "hard exit": lambda: os._exit(3),
        "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
        "interrupt": interrupt,
        "leak": lambda: PLENTY.append(bytearray(200 << 20)),
        "child": lambda: subprocess.Popen(["sleep", "1000"]),
        "print": lambda: print("x" * 1000, flush=True),
        "garbage": garbage,
    }.get(completions[0], lambda: None)()
    answers = {
        "short": [1.0] * (len(completions) - 1),
        "none": [None] * len(completions),
        "text": ["1.0"] * len(completions),
        "nan": [float("nan"), float("inf"), 1.0, None][: len(completions)],
        "scalar": 1.0,
        "nothing": None,
    }
    return answers.get(completions[0], [1.0] * len(completions))


def spin():
    while True:
        pass


def deaf():
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    spin()


def interrupt():
    raise KeyboardInterrupt


def garbage():
    for number in range(3, 1024):
        try:
            os.write(number, b"garbage\n")
        except OSError:
            continue


async def slowly(prompts, completions, **columns):
    import asyncio

    await asyncio.sleep(0.01)
    return [2.0] * len(completions)


def even(prompts, completions, **columns):
    return [1.0 if len(completion) % 2 == 0 else None for completion in completions]


def told(prompts, completions, answer, completion_ids, log_metric, log_extra, **columns):
    """Checks what it gets, and logs."""
    assert prompts == ["p"] * len(completions)
    assert columns == {"task": ["t"] * len(completions), "forwards": [5] * len(completions)}
    log_metric("asked", len(completions))
    log_extra("seen", answer)
    return [float(len(ids)) for ids in completion_ids]


def environment(prompts, completions, **columns):
    assert os.environ["OMP_NUM_THREADS"] == "1"
    assert "torch" not in sys.modules
    assert "ray" not in sys.modules
    return [float(os.getpid())] * len(completions)
