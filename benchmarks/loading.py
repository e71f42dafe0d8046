"""Reading and writing a checkpoint of per-expert tensors beside its bytes alone: seconds and memory in one run.

    python -m benchmarks.loading                  # 4 GB; needs 12 GB of memory and 9 GB of disk

Makes a random LLaDA2-MoE in bfloat16, writes it under its original names (one tensor an expert and projection, in shards of
1 GB) and reads it again as a Policy in a process of its own. Beside that the bytes of the same files are read, and written,
through a buffer of 16 MiB: once from the page cache, and once after an advice to drop them from it, that is from the disk
(on Linux; elsewhere both are from the cache). Memory is the largest size of the process that reads,
above that with a small model, without the pages of the mapped files, which the kernel takes back when it needs them.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import PeakMemory
from dfactory.models.registry import load_policy
from dfactory.models.saving import save_policy
from dfactory.models.tiny import write_tiny_config

BUFFER, SHARD = 16 * 2**20, 10**9
LAYER = {"hidden_size": 1024, "moe_intermediate_size": 512, "num_experts": 64, "num_experts_per_tok": 4}
LAYER |= {"intermediate_size": 2048, "n_group": 4, "topk_group": 2, "num_attention_heads": 16, "head_dim": 64}
LAYER_BYTES = 2 * 64 * 3 * 1024 * 512  # of the experts


def write_checkpoint(directory: Path, gigabytes: float, vocabulary: int) -> float:
    """Seconds that writing took."""
    layers = 1 + max(1, round(gigabytes * 1e9 / LAYER_BYTES))
    shape = LAYER | {"num_hidden_layers": layers, "vocab_size": vocabulary, "pad_token_id": None}
    config = write_tiny_config(directory / "config_only", **shape)
    policy = load_policy(config, dtype="bfloat16", init_weights="random")
    (directory / "model").mkdir()
    started = time.perf_counter()
    save_policy(policy, directory / "model", max_shard_bytes=SHARD)
    return time.perf_counter() - started


def weight_files(directory: Path) -> list[Path]:
    return sorted((directory / "model").glob("*.safetensors"))


def read_bytes(directory: Path) -> float:
    buffer, started = bytearray(BUFFER), time.perf_counter()
    for path in weight_files(directory):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def drop_from_cache(directory: Path) -> None:
    """Ask the kernel to forget the files' pages, so that the next one who reads them waits for the disk."""
    for path in weight_files(directory):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_bytes(directory: Path) -> float:
    buffer, started = bytes(BUFFER), time.perf_counter()
    for path in weight_files(directory):
        with (directory / "copy").open("wb", buffering=0) as file:
            for _ in range(path.stat().st_size // BUFFER):
                file.write(buffer)
    seconds = time.perf_counter() - started
    (directory / "copy").unlink()
    return seconds


def own_memory() -> int:
    used = psutil.Process().memory_info()
    return used.rss - used.shared


def read_policy(directory: Path) -> tuple[float, int]:
    """Seconds, and bytes at the peak above what the process takes without the model."""
    load_policy("tiny", dtype="bfloat16")
    before, started = own_memory(), time.perf_counter()
    with PeakMemory(own_memory) as memory:
        load_policy(directory / "model", dtype="bfloat16")
    return time.perf_counter() - started, memory.peak - before


def in_a_process(function, *arguments):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of experts (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a size for tests")
    options = parser.parse_args(arguments)
    if options.smoke:
        vars(options).update(gigabytes=0.2, vocabulary=512, rounds=1)

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        saving = in_a_process(write_checkpoint, directory, options.gigabytes, options.vocabulary)
        size = sum(file.stat().st_size for file in weight_files(directory))
        copying = copy_bytes(directory)
        plain, loads = {"cache": [], "disk": []}, {"cache": [], "disk": []}
        for _ in range(options.rounds):
            for place in plain:
                prepare = drop_from_cache if place == "disk" else read_bytes
                prepare(directory)
                plain[place].append(read_bytes(directory))
                prepare(directory)
                loads[place].append(in_a_process(read_policy, directory))
    peak = max(memory for found in loads.values() for _, memory in found)
    table = Table("", "its bytes, s", "the policy, s", "ratio", title=f"{size / 1e9:.2f} GB in bfloat16")
    for place in plain:
        reading, loading = statistics.median(plain[place]), statistics.median(seconds for seconds, _ in loads[place])
        table.add_row(f"read from {place}", f"{reading:.2f}", f"{loading:.2f}", f"{loading / reading:.2f}")
    table.add_row("write", f"{copying:.2f}", f"{saving:.2f}", f"{saving / copying:.2f}")
    table.caption = f"memory while reading: {peak / 1e9:.2f} GB, {peak / size:.2f} times the files"
    Console(width=100, highlight=False).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
