"""The process group: one rank by itself, or many under torchrun, slurm or Ray."""

import atexit
import os
import resource
import socket
import sys
import warnings
from collections.abc import Callable
from typing import Any

import psutil
import torch
import torch.distributed as dist

from dfactory.errors import DFactoryError

if not torch.cuda.is_available():  # before anything imports DeepSpeed, which else warns that it looked for a GPU
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

_at_start = 0  # bytes of the resident set when the process joined its group


def start() -> tuple[int, int]:
    """Join the process group (once) and return (rank, world size). Without a launcher: a group of one, without a port."""
    global _at_start
    if not dist.is_initialized():
        _at_start = psutil.Process().memory_info().rss
        if "MASTER_ADDR" not in os.environ:  # no launcher; a parent process like this one may have left its RANK
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
            os.environ.setdefault(
                "GLOO_SOCKET_IFNAME", _loopback()
            )  # else it listens on the address of the host's name
            dist.init_process_group(_backend(), store=dist.HashStore(), rank=0, world_size=1)  # needs no port
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's old names
        import deepspeed

        # On a CPU DeepSpeed would compile a kernel for inference at the first start. dFactory never calls it, and a
        # process that is killed during the compilation leaves a lock that blocks all later ones. DeepSpeed reads only
        # this entry, so it does not probe the compiler for its other kernels either.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
        deepspeed.init_distributed(dist_backend=_backend(), verbose=False)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return dist.get_rank(), dist.get_world_size()


def leave_at_exit() -> None:
    """Leave the process group before the interpreter ends. For ranks that have ended in order: all of them call it.

    A gloo thread that lets go of its last tensor takes Python's lock. While the interpreter ends that kills the thread, and
    the thread kills the process (SIGABRT): a finished run would report a failure. Leaving joins the threads first. A rank
    that failed must not wait for them, since the others may never answer.
    """
    atexit.unregister(_leave)
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def peak_memory() -> dict[str, int]:
    """Bytes: the peak that was allocated on this rank's GPU; without a GPU, the peak growth of the resident set since the
    process joined its group, which leaves out Python and its libraries."""
    if torch.cuda.is_available():
        return {"peak_memory": torch.cuda.max_memory_allocated()}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - _at_start}


def all_reduce_sum(tensor: torch.Tensor) -> None:
    """Sum over the ranks, in place, for a tensor on any device."""
    if dist.get_world_size() == 1:
        return
    moved = tensor.to(device())
    dist.all_reduce(moved)
    tensor.copy_(moved)


def ranks_with(flag: bool) -> list[int]:
    """The ranks on which `flag` is true, the same list on all ranks."""
    votes = torch.zeros(dist.get_world_size())
    votes[dist.get_rank()] = float(flag)
    all_reduce_sum(votes)
    return votes.nonzero()[:, 0].tolist()


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank, the same on all ranks."""
    return bool(ranks_with(flag))


def on_first_rank(ask: Callable[[], Any]) -> Any:
    """The result of `ask` on the first rank, broadcast to all; an expected failure is raised on all of them."""
    box = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = ask()
        except DFactoryError as problem:
            box[1] = problem
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def gather(value: Any) -> list[Any]:
    """The values of all ranks, in their order, on every rank."""
    box = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def _loopback() -> str:
    """The name of the loopback interface: `lo` on Linux, `lo0` on macOS."""
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def _backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"
