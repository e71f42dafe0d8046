"""What setup.cfg's build commands add: the recipes to a wheel, the rest of the repository to an sdist.

The recipes lie beside the package, where a reader of the repository looks for them; installed they are
`dfactory/recipes` (dfactory/commands/recipes.py finds them in either place).
"""

from pathlib import Path

from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parents[1]
RECIPES = "recipes"
IN_SDIST = (RECIPES, "benchmarks", "data_tools", "docs", "examples", "launch", "tests", ".ci")
MADE = {"__pycache__", "actions/data"}  # what is made beside them, and never part of a release


def files_of(folder: str) -> list[Path]:
    """The files of a folder of the repository, relative to its root; empty where an sdist was made without it."""
    found = sorted(path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file())
    return [path for path in found if not any(f"/{made}/" in f"/{path.as_posix()}" for made in MADE)]


class BuildWithRecipes(build_py):
    """Copies recipes/ to dfactory/recipes of what is built. An editable install reads them where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for file in files_of(RECIPES):
            target = Path(self.build_lib) / "dfactory" / file
            self.mkpath(str(target.parent))
            self.copy_file(str(ROOT / file), str(target))


class WholeSdist(sdist):
    """Adds what a checkout has, so that the tests of an sdist run and its wheel is that of the checkout."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        more = {str(file) for folder in IN_SDIST for file in files_of(folder)}
        super().make_release_tree(base_dir, sorted({*files, *more}))
