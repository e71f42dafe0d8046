"""`dfactory schema --families`: the model families, as the table of docs/families.md."""

from dfactory.models.families.base import FAMILIES, Family, Noise, Variant

COLUMNS = "family,`model_type`,checkpoints,class of transformers,attention,shift,noise,blocks,mask,EOS"


def families() -> int:
    print(family_table())
    return 0


def family_table() -> str:
    """The families with what they declare, in Markdown: a row for each `model_type`."""
    heads = COLUMNS.split(",")
    rows = [_cells(family, variant) for family in FAMILIES for variant in family.variants]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


def _cells(family: Family, variant: Variant) -> list[str]:
    architectures = f" with `{'`, `'.join(variant.architectures)}`" if variant.architectures else ""
    return [
        f"`{family.name}`",
        f"`{variant.model_type}`{architectures}",
        variant.checkpoints,
        f"`{variant.base_class.__name__}`",
        family.attention,
        "0 or 1" if family.autoregressive else str(family.logit_shift),
        family.noise,
        "whole document" if family.block_size is None else str(family.block_size),
        "none" if family.noise is Noise.UNIFORM else _id(family.special.mask),
        _id(family.special.eos),
    ]


def _id(token: int | None) -> str:
    return "tokenizer" if token is None else str(token)
