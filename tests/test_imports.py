"""Imports stand at the top of a file, or have a reason; the import contract of setup.cfg names all of the package."""

import ast
import configparser
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("dfactory", "data_tools", "benchmarks", "examples", "launch")
FILES = sorted(file.relative_to(ROOT) for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))

LATE_PACKAGES = {
    "gguf": "an extra",
    "liger_kernel": "an extra, for CUDA only",
    "pyseccomp": "an extra; it fails to import where libseccomp is missing",
    "reasoning_gym": "an extra",
    "packaging": "dfactory doctor answers where it is missing",
    "sympy": "comes with math_verify",
    "trl": "an extra",
    "deepspeed": "asks for the accelerator and warns; what trains without it, or only decodes, does without both",
    "math_verify": "an extra",
    "matplotlib": "0.3 s, for animations alone",
    "peft": "takes seconds, for adapters alone",
    "PIL": "for animations alone",
    "datasets": "1.3 s, for tables and datasets of the hub alone",
    "pyarrow": "for tables alone",
    "torch.nn.attention.flex_attention": "torch.compile's parts, for GPUs alone",
    "torch": "dfactory doctor answers where it is missing, or does not load",
}
"""Packages that are imported inside functions, each with the reason."""

LATE_FILES = {
    "dfactory/cli.py": "--help answers at once: every verb imports what it needs when it is called",
    "dfactory/commands/doctor.py": "dfactory doctor answers where torch, or what is beside it, is missing",
    "dfactory/train.py": "dfactory.rl.cluster imports Ray, an extra, and only after the local cluster is locked",
    "dfactory/data_tools/command.py": "transformers takes seconds; convert, mix, split and dedup read no tokenizer",
    "dfactory/data_tools/validate.py": "torch and DeepSpeed take seconds; without --recipe rows are checked without them",
}
"""Files with imports of dFactory's own inside functions, each with the reason."""


def imported(node: ast.AST) -> list[str]:
    """The modules that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) else []


def late_imports() -> Iterator[tuple[str, str]]:
    """(file, module) of every import inside a function."""
    for file in FILES:
        for function in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                for node in ast.walk(function):
                    yield from ((str(file), name) for name in imported(node))


def late_package(module: str) -> str | None:
    """The entry of LATE_PACKAGES that a module belongs to."""
    return next((name for name in LATE_PACKAGES if f"{module}.".startswith(f"{name}.")), None)


def test_every_late_import_has_a_reason():
    found = set(late_imports())
    own = {(file, module) for file, module in found if module.partition(".")[0] in FOLDERS}
    unexplained = {(file, module) for file, module in own if file not in LATE_FILES}
    unexplained |= {(file, module) for file, module in found - own if late_package(module) is None}
    assert not unexplained
    stale = set(LATE_FILES) - {file for file, _ in own}
    stale |= set(LATE_PACKAGES) - {late_package(module) for _, module in found - own}
    assert not stale, "these reasons have no import any more"


def test_no_file_changes_where_modules_are_found():
    """rl/rewards/pool.py reads sys.path: a reward's module is found by its worker where the run finds it."""
    changed = re.compile(r"sys\.path\s*(?:=[^=]|\+=|\[|\.(?:insert|append|extend|remove))|__path__\s*(?:=[^=]|\+=)")
    assert not [str(file) for file in FILES if changed.search((ROOT / file).read_text())]


def test_the_contract_names_every_module():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    layers = set(re.split(r"[\s|]+", config["importlinter:contract:layers"]["layers"].strip()))
    modules = {
        path.stem for path in (ROOT / "dfactory").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    wanted = {f"dfactory.{name}" for name in modules - {"__init__"}} | {"benchmarks", "data_tools"}
    assert layers == wanted


@pytest.mark.parametrize("folder", ["dfactory", "data_tools", "benchmarks"])
def test_the_contract_covers(folder):
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert folder in config["importlinter"]["root_packages"].split()
