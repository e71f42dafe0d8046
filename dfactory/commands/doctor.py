"""`dfactory doctor`: what this machine and this environment have, which feature lacks what, and how to add it.

Packages are compared with what the installed dFactory declares (importlib.metadata), so the list is never another one than
pip's. Only the standard library is imported at the top: it has to answer in an environment that lacks the rest.
"""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from dfactory.commands.recipes import PACKAGE, recipes_folder
from dfactory.errors import ConfigError
from dfactory.rl.sandbox import strongest_isolation
from dfactory.versions import version_of

EXTRAS = {
    "rl": "stage rl: Ray, rewards, tasks of reasoning-gym",
    "wandb": "report_to: [wandb]",
    "trackers": "report_to: [tensorboard, trackio, wandb]",
    "comet": "report_to: [comet_ml]",
    "8bit": "optim: adamw_8bit",
    "eval": "dfactory eval --lm-eval",
    "smollm2": "dfactory data gguf, recipes/smollm2",
    "liger": "use_liger_kernel, on CUDA",
    "dev": "the tests, for a checkout",
    "docs": "the site of docs/, for a checkout",
}
"""What each extra of setup.cfg is for."""
GIB = 2**30
LEAST_SHARED_GIB = 1
CONTROL_GROUP = Path("/sys/fs/cgroup/memory.max")


class Feature(NamedTuple):
    """What one can do, what it lacks here (empty: nothing), and how to add that."""

    name: str
    lacks: str = ""
    fix: str = ""
    has: str = ""  # shown where nothing is lacking


def doctor() -> int:
    """Print the environment and the features. Returns 1 where a package is missing that every verb needs, else 0."""
    print("Environment")
    facts = list(environment())
    width = max(len(name) for name, _ in facts)
    for name, text in facts:
        print(f"  {name:<{width}}  {text}")
    core, *others = found = features()
    print("\nFeatures")
    for feature in found:
        print(f"  {'-- ' if feature.lacks else 'ok '} {feature.name}{told(feature)}")
    if core.lacks:
        print("\nNo verb that runs a model works until the first line is mended.")
        return 1
    missing = sum(bool(feature.lacks) for feature in others)
    print(
        f"\n{len(found) - missing} of {len(found)} features are there; train, generate, eval, chat, serve and export work."
    )
    return 0


def told(feature: Feature) -> str:
    if not feature.lacks:
        return f": {feature.has}" if feature.has else ""
    return f"\n       lacks: {feature.lacks}\n       fix:   {feature.fix}"


# --- the environment ----------------------------------------------------------------------------------------------------


def environment() -> Iterable[tuple[str, str]]:
    """(what, its value), one line each. No secret is among them: of a token only whether it is set."""
    yield "dfactory", f"{version_of('dfactory')}, {PACKAGE}"
    yield "python", f"{platform.python_version()}, {sys.executable}"
    yield "system", platform.platform()
    threads = os.environ.get("OMP_NUM_THREADS", "not set: all cores")
    yield "cores", f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}, OMP_NUM_THREADS {threads}"
    yield "memory", f"{memory() / GIB:.1f} GiB"
    for name, folder in (("disk here", Path.cwd()), ("shared memory", Path("/dev/shm"))):
        yield name, f"{free(folder) / GIB:.1f} GiB free"
    for package in ("torch", "transformers", "deepspeed"):
        yield package, version_of(package)
    yield "devices", devices()
    hub = os.environ.get("HF_HOME", "~/.cache/huggingface")
    offline = "offline" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else "online"
    token = "a token is set" if os.environ.get("HF_TOKEN") else "no HF_TOKEN"
    yield "hub", f"{hub}, {offline}, {token}"


def memory() -> int:
    """Bytes that this process may use: the machine's, or what its control group allows."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CONTROL_GROUP.read_text().strip() if CONTROL_GROUP.is_file() else "max"
    return min(total, int(limit)) if limit.isdecimal() else total


def free(folder: Path) -> int:
    return shutil.disk_usage(folder).free if folder.exists() else 0


def devices() -> str:
    """The GPUs that torch sees, or why there are none."""
    try:
        import torch
    except ImportError as problem:
        return f"torch does not import ({problem})"
    if not torch.cuda.is_available():
        return f"no CUDA device (torch is built for {torch.version.cuda or 'CPUs'}){of_cpu()}"
    names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    told = [f"{one.name} with {one.total_memory / GIB:.0f} GiB, sm_{one.major}{one.minor}" for one in names]
    return f"{', '.join(told)}; CUDA {torch.version.cuda}"


def of_cpu() -> str:
    """Which precision it is for; nothing where that cannot be measured, for which a feature says what is missing."""
    try:
        from dfactory.models.precision import faster_precision
    except ImportError:
        return ""
    return f"; {faster_precision('cpu').reason}"


# --- features -----------------------------------------------------------------------------------------------------------


def features() -> list[Feature]:
    """What every verb needs, then the extras of the package, then what the machine has to have."""
    return [*of_packages(requirements()), of_recipes(), of_gpu(), of_compiler(), of_sandbox(), of_shared_memory()]


def requirements() -> Mapping[str, list[str]]:
    """What the installed dFactory declares, by extra; "" is what every verb needs. Empty where it is not installed."""
    found: dict[str, list[str]] = {}
    try:
        declared = importlib.metadata.requires("dfactory") or []
    except importlib.metadata.PackageNotFoundError:
        return found
    for line in declared:
        requirement, _, marker = line.partition(";")
        extra = marker.partition("extra ==")[2].strip().strip("\"'")
        found.setdefault(extra, []).append(requirement.strip())
    return found


def of_packages(declared: Mapping[str, list[str]], version: Callable[[str], str] = version_of) -> list[Feature]:
    """A feature for what every verb needs, and for each extra; `version` is `unknown` for what is not installed."""
    if not declared:
        return [Feature("every verb", "dfactory is not installed here", "pip install -e . in the checkout")]
    core = "every verb: train, generate, eval, chat, serve, export"
    found = [Feature(core, lacking(declared.get("", []), version), "pip install --force-reinstall dfactory's wheel")]
    for extra, needs in declared.items():
        if extra:
            name = f"[{extra}] {EXTRAS.get(extra, 'an extra')}"
            found.append(Feature(name, lacking(needs, version), f"pip install 'dfactory[{extra}]'"))
    return found


def lacking(needs: Iterable[str], version: Callable[[str], str]) -> str:
    """Which requirements are not installed, or are older than they have to be."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return "packaging"
    missing = []
    for need in map(Requirement, needs):
        installed = version(need.name)
        if installed == "unknown":
            missing.append(f"{need.name}{need.specifier}")
        elif not need.specifier.contains(installed, prereleases=True):
            missing.append(f"{need.name}{need.specifier} (installed is {installed})")
    return ", ".join(missing)


def of_recipes() -> Feature:
    try:
        return Feature("recipes, dfactory quickstart", has=str(recipes_folder()))
    except ConfigError as problem:
        return Feature("recipes, dfactory quickstart", str(problem), "pip install --force-reinstall dfactory's wheel")


def of_gpu() -> Feature:
    name, found = "the 7B to 100B models", devices()
    if "CUDA " in found and "no CUDA" not in found:
        return Feature(name, has=found)
    fix = "run on a machine with NVIDIA GPUs and torch's CUDA build; recipes/HARDWARE.md says how many"
    return Feature(name, found, fix)


def of_compiler() -> Feature:
    name = "flex_attention on a GPU, the optimiser offloaded to the CPU"
    absent = [
        what
        for what, tools in (("a C++ compiler", ("g++", "c++", "clang++")), ("ninja", ("ninja",)))
        if not _any(tools)
    ]
    return Feature(name, ", ".join(absent), "apt-get install g++ ninja-build", has="a C++ compiler and ninja")


def _any(tools: Iterable[str]) -> bool:
    beside = str(Path(sys.executable).parent)  # where pip puts ninja, also without an activated environment
    return any(shutil.which(tool) or shutil.which(tool, path=beside) for tool in tools)


def of_sandbox() -> Feature:
    """A program is run in it, as code_tests does."""
    name = "the reward code_tests, which runs programs that a model wrote"
    try:
        isolation, refusals = strongest_isolation()
    except ConfigError as problem:
        return Feature(name, str(problem), "apt-get install bubblewrap libseccomp2; pip install 'dfactory[rl]'")
    weaker = "".join(f"; {stronger}: {reason}" for stronger, reason in refusals.items())
    return Feature(name, has=f"{isolation.value}{weaker}")


def of_shared_memory() -> Feature:
    name, there = "stage rl with large models: Ray's object store", free(Path("/dev/shm")) / GIB
    if there >= LEAST_SHARED_GIB:
        return Feature(name, has=f"{there:.1f} GiB in /dev/shm")
    return Feature(
        name, f"/dev/shm has {there:.2f} GiB free", "docker run --shm-size=16g, or mount a larger tmpfs there"
    )
