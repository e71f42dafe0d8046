"""glibc keeps freed memory: when, what it does in a real process, and that nothing else of a process changes."""

import os
import platform
import subprocess
import sys

import pytest

from dfactory import allocator
from dfactory.cli import main
from dfactory.errors import ConfigError
from tests.engine.conftest import ROOT

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
FAULTS = """
import resource, torch
from dfactory.allocator import keep_freed_memory
keep_freed_memory()
for round in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)  # 64 MB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


HOLES = """
import torch
from dfactory import allocator
allocator.keep_freed_memory()
allocator.bound_freed_memory()  # after a first step
tensors = [torch.ones(2**20) for _ in range(400)]  # of 4 MB
left = tensors[::2]
del tensors
before = allocator.resident_bytes()
allocator.bound_freed_memory()
print(before - allocator.resident_bytes(), len(left))
"""


@pytest.mark.parametrize(
    "environment, libc, has_gpu, keeps",
    [
        ({}, "glibc", False, True),
        ({"DFACTORY_MALLOC": "keep"}, "glibc", False, True),
        ({"DFACTORY_MALLOC": "system"}, "glibc", False, False),
        ({}, "glibc", True, False),
        ({}, "", False, False),  # macOS, musl
        ({"MALLOC_TRIM_THRESHOLD_": "1000000"}, "glibc", False, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0"}, "glibc", False, False),
        ({"GLIBC_TUNABLES": "glibc.rtld.nns=4"}, "glibc", False, True),
        ({"LD_PRELOAD": "/usr/lib/libjemalloc.so.2"}, "glibc", False, False),
        ({"LD_PRELOAD": "libother.so"}, "glibc", False, True),
    ],
)
def test_when_memory_is_kept(environment, libc, has_gpu, keeps):
    assert allocator.options(environment, libc, has_gpu) == (allocator.OPTIONS if keeps else {})


def test_an_unknown_choice():
    with pytest.raises(ConfigError, match="DFACTORY_MALLOC is 'jemalloc': it must be keep"):
        allocator.options({"DFACTORY_MALLOC": "jemalloc"}, "glibc", False)


def run(*words: str, **variables: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name not in (allocator.VARIABLE, *allocator.OWN)}
    kept |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | variables
    return subprocess.run([sys.executable, *words], env=kept, capture_output=True, text=True, timeout=120, check=False)


@needs_glibc
def test_a_freed_tensor_costs_no_page_faults():
    kept, returned = (int(run("-c", FAULTS, DFACTORY_MALLOC=choice).stdout) for choice in ("keep", "system"))
    assert kept < 1000
    assert returned > 100_000 or returned > 100 * max(kept, 1)


@needs_glibc
def test_what_lies_free_between_blocks_is_returned_when_a_process_has_grown():
    returned, still = (int(run("-c", HOLES, DFACTORY_MALLOC=choice).stdout.split()[0]) for choice in ("keep", "system"))
    assert returned == pytest.approx(200 * 2**22, rel=0.1)
    assert still == 0


@needs_glibc
def test_a_run_says_so_once(tmp_path):
    keys = ("max_steps=1", "save_steps=null", "eval_datasets=[]", "eval_steps=null", f"output_dir={tmp_path}/run")
    done = run("-m", "dfactory.cli", "train", str(ROOT / "recipes/quickstart/sft.yaml"), *keys)
    assert (done.returncode, done.stdout.count("glibc malloc")) == (0, 1), done.stdout[-2000:] + done.stderr[-2000:]


def test_a_wrong_choice_ends_a_verb(monkeypatch, capsys):
    monkeypatch.setenv(allocator.VARIABLE, "yes")
    assert main(["generate", "--model", "tiny", "--input", "none.jsonl", "--output", "none"]) == 2
    message = "dfactory generate: DFACTORY_MALLOC is 'yes': it must be keep (default) or system\n"
    assert capsys.readouterr().err == message
