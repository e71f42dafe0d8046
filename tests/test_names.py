"""The name of an algorithm, a model family, a decoding rule or a reward is a string in its own file, and nowhere else in
code: whoever wants one asks the table."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from dfactory.algorithms import ALGORITHMS
from dfactory.decoding.rules.base import RULES
from dfactory.models.families.base import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
TABLES = {"algorithms": ALGORITHMS, "families": FAMILIES, "rules": RULES}
ALLOWED = {
    ("dfactory/config/noise.py", "trace"): "a value of view_source: views from a decoder's trace",
    ("dfactory/algorithms/dpo.py", "sft"): "a term of the loss, as metrics.jsonl names it",
    ("dfactory/models/fused.py", "llama"): "Liger's word for a way to round",
    ("dfactory/models/families/llada.py", "llama"): "OLMo's word for a kind of block",
    ("benchmarks/__init__.py", "cpt"): "the name of a benchmark",
    ("benchmarks/rl.py", "ebpo"): "the benchmark is of this algorithm",
    ("benchmarks/rl.py", "threshold"): "a key of the decoder",
    ("benchmarks/decoding.py", "threshold"): "a key of the decoder",
    ("benchmarks/workload.py", "A2DLlamaLMHeadModel"): "the config.json of a benchmark's model",
    ("benchmarks/workload.py", "A2DQwen3LMHeadModel"): "the config.json of a benchmark's model",
    ("dfactory/decoding/rules/renoise.py", "entropy_bound"): "a key of SGLang's configuration",
    ("dfactory/commands/quickstart_table.py", "threshold"): "a column of thresholds.jsonl",
    ("dfactory/config/earlier.py", "cap"): "what a key of the earlier dFactory selects",
    ("dfactory/config/earlier.py", "sft"): "what a key of the earlier dFactory selects",
}
"""(file, string) -> what the string is there instead of a name, or why it has to be one."""


def constants(file: Path) -> Iterator[tuple[str | int, int]]:
    """The string and integer constants of a file with their lines, docstrings left out."""
    tree = ast.parse(file.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = {id(n.body[0].value) for n in ast.walk(tree) if isinstance(n, documented) and _has_docstring(n)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str | int) and id(node) not in docs:
            yield node.value, node.lineno


def _has_docstring(node: ast.AST) -> bool:
    return bool(node.body) and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)


@pytest.fixture(scope="module")
def places() -> dict[str | int, list[str]]:
    """Where each constant stands: `file:line`."""
    found = defaultdict(list)
    for folder in ("dfactory", "data_tools", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            name = str(file.relative_to(ROOT))
            for text, line in constants(file):
                if (name, text) not in ALLOWED:
                    found[text].append(f"{name}:{line}")
    return found


@pytest.mark.parametrize("seam", TABLES)
def test_a_name_stands_in_its_own_file_only(places, seam):
    package = TABLES[seam].package.replace(".", "/")
    wrong = []
    for name in TABLES[seam].names:
        own = {place.partition(":")[0] for place in places[name] if place.startswith(package)}
        if len(own) != 1:
            wrong.append(f"{name}: {sorted(own)} in its package")
        wrong += [f"{place} {name!r}" for place in places[name] if not place.startswith(package)]
    assert wrong == [], "\n".join(wrong)


def test_architectures_and_special_ids_stand_in_the_families_only(places):
    """Also those that SGLang goes by. Small ids are also other numbers."""
    package = f"{FAMILIES.package.replace('.', '/')}/"
    variants = [variant for family in FAMILIES for variant in family.variants]
    names = {name for v in variants for name in (v.model_class.__name__, *v.architectures)}
    served = [v.in_sglang for v in variants if v.in_sglang is not None]
    ids = {id for family in FAMILIES for id in family.special} | {one.mask for one in served}
    known = names | {one.architecture for one in served} | {id for id in ids if id is not None and id > 1000}
    assert [f"{place} {one!r}" for one in known for place in places[one] if not place.startswith(package)] == []
    assert len(served) == 4


def test_what_is_allowed_is_there():
    """An exception that no file needs any more goes."""
    for name, text in ALLOWED:
        assert text in [found for found, _ in constants(ROOT / name)], (name, text)
