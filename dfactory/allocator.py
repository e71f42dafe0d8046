"""Keep freed memory in the process, where glibc allocates and no GPU computes.

By default glibc maps every block above 32 MB from the system and unmaps it when it is freed, and returns the free end of its
heap. A training step frees and allocates the same tensors again and again, so the system clears the same pages at every
step: up to a third of the processor's time, for wide models (benchmarks/LOG.md, Growth). `keep_freed_memory` makes glibc
take all blocks from its heap, whose end stays. What lies free between blocks in use then grows with the variety of sizes: in
250 steps of SmolLM2 by 80 percent of what the first step took. `bound_freed_memory`, called between steps, returns what is
free when the process has grown by a quarter.

The options that glibc reads from the environment (MALLOC_TRIM_THRESHOLD_ and the like) have precedence, and so has an
allocator in LD_PRELOAD. With another C library, or with a GPU, nothing changes.
"""

import ctypes
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import torch

from dfactory.errors import ConfigError

VARIABLE = "DFACTORY_MALLOC"
KEEP, SYSTEM = "keep", "system"
OPTIONS = {  # of mallopt, from malloc.h
    -4: 0,  # M_MMAP_MAX: no block is mapped on its own
    -1: -1,  # M_TRIM_THRESHOLD: the end of the heap is never returned; an unsigned number, so this is the largest
    -2: 64 * 2**20,  # M_TOP_PAD: what the heap grows by at least
}
OWN = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")  # set by a user

GROWTH = 1.25  # by which a process may grow before what it has freed is returned

_keeps = False
_standing = 0  # bytes resident after the first step, and after the first one since freed memory was returned


def options(environment: Mapping[str, str], libc: str, has_gpu: bool) -> dict[int, int]:
    """What to call mallopt with; empty where nothing changes. Raises ConfigError for an unknown value of DFACTORY_MALLOC."""
    choice = environment.get(VARIABLE, KEEP)
    if choice not in (KEEP, SYSTEM):
        raise ConfigError(f"{VARIABLE} is {choice!r}: it must be {KEEP} (default) or {SYSTEM}")
    own = any(name in environment for name in OWN) or "glibc.malloc." in environment.get("GLIBC_TUNABLES", "")
    other = "malloc" in environment.get("LD_PRELOAD", "")  # jemalloc, tcmalloc, mimalloc
    return {} if choice == SYSTEM or libc != "glibc" or has_gpu or own or other else OPTIONS


def keep_freed_memory() -> None:
    """Do so in this process, from now on. Once is enough."""
    global _keeps
    chosen = options(os.environ, platform.libc_ver()[0], torch.cuda.is_available())
    if chosen and not _keeps:
        _keeps = all(ctypes.CDLL(None).mallopt(*option) for option in chosen.items())


def bound_freed_memory() -> None:
    """To be called after a step: return freed memory to the system if the process has outgrown what a step takes."""
    global _standing
    if not _keeps:
        return
    now = resident_bytes()
    if _standing == 0:
        _standing = now
    elif now > GROWTH * _standing:
        ctypes.CDLL(None).malloc_trim(0)
        _standing = 0


def resident_bytes() -> int:
    """Of this process, by Linux' /proc."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def note() -> str:
    """What a run has to say of it. Empty where nothing has changed."""
    return f"glibc malloc keeps freed memory for reuse; {VARIABLE}={SYSTEM} turns it off" if _keeps else ""
