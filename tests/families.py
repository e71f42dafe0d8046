"""The table of docs/families.md, made of what the families declare. Run as a program it writes the table into the page:

python -m tests.families
"""

from pathlib import Path

from dfactory.models.families.base import FAMILIES, Family, Variant

PAGE = Path(__file__).parents[1] / "docs/families.md"
BEGIN, END = "<!-- table of families -->", "<!-- end of the table -->"
HEAD = (
    "| family | `model_type` | checkpoints | class of transformers | attention | shift | noise | blocks | mask, EOS |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def table() -> str:
    return "\n".join([HEAD, *(_row(family, variant) for family in FAMILIES for variant in family.variants)])


def _row(family: Family, variant: Variant) -> str:
    architectures = f" with `{'`, `'.join(variant.architectures)}`" if variant.architectures else ""
    special = ", ".join("tokenizer's" if token is None else str(token) for token in family.special)
    cells = (
        f"`{family.name}`",
        f"`{variant.model_type}`{architectures}",
        variant.checkpoints,
        f"`{variant.base_class.__name__}`",
        family.attention,
        str(family.logit_shift),
        family.noise,
        "whole document" if family.block_size is None else str(family.block_size),
        special,
    )
    return f"| {' | '.join(cells)} |"


def page(text: str) -> str:
    """The page with the table as it has to be."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
