"""`dfactory recipes`: lists the recipes that come with dFactory, or copies them to where one edits them."""

import shutil
from pathlib import Path

from dfactory.errors import ConfigError

PACKAGE = Path(__file__).resolve().parents[1]
EXAMPLE = "quickstart/sft.yaml"


def recipes_folder(package: Path = PACKAGE) -> Path:
    """recipes/ of the installed package, or of the checkout that it is in. Raises ConfigError where neither is."""
    for folder in (package / "recipes", package.parent / "recipes"):
        if (folder / EXAMPLE).is_file():
            return folder
    raise ConfigError(f"{package} has no recipes, and neither has its parent: install dFactory's wheel again")


def recipes(output: str | None) -> int:
    """Print one line a recipe; with `output`, copy the folder there.

    Raises ConfigError if `output` is not free, so that no edited recipe is lost.
    """
    folder = recipes_folder()
    if output is None:
        for file in sorted(folder.glob("*/*.yaml")):
            print(f"{file.relative_to(folder)}: {headline(file)}")
        print(f"They are in {folder}; `dfactory recipes --output recipes` copies them, to edit and to run.")
        return 0
    target = Path(output)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"--output {target} exists and is not an empty directory: give a new one")
    shutil.copytree(folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    print(f"copied to {target}: `dfactory check {target / EXAMPLE}` is a dry run of one")
    return 0


def headline(recipe: Path) -> str:
    """The first sentence of its header."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    header = [line.removeprefix("#").strip() for line in lines[: _length_of_header(lines)]]
    return " ".join(header).partition(". ")[0].rstrip(".:")


def _length_of_header(lines: list[str]) -> int:
    """Up to the first empty line of comment."""
    return next(
        (i for i, line in enumerate(lines) if line.strip() in ("#", "") or not line.startswith("#")), len(lines)
    )
