"""Recipe keys of token editing: visible tokens as targets, and the model's own drafts as views (LLaDA2.1)."""

from dataclasses import dataclass
from typing import Optional

from dfactory.config.keys import key


@dataclass
class EditingKeys:
    edit_share: float = key(
        0.0, "share of the visible response tokens that noise replaces; the model has to repair them", low=0.0, high=1.0
    )
    edit_source: str = key(
        "uniform",
        "what replaces them: tokens drawn uniformly, or what the model itself predicts there (a forward more a step)",
        choices=("uniform", "model"),
    )
    keep_share: float = key(
        1.0, "with editing, share of the other visible response tokens that are targets as they are", low=0.0, high=1.0
    )
    num_turns: int = key(
        1,
        "turns of each view: the model's draft of one is the next, in the same row (each a forward more a step)",
        low=1,
    )
    draft_share: float = key(
        0.5, "share of the targets that carry the draft in the next turn; the others stay", low=0.0, high=1.0
    )
    draft_threshold: Optional[float] = key(
        None,
        "instead of a share: targets carry the draft where its probability exceeds this, as in decoding",
        low=0.0,
        high=1.0,
    )
