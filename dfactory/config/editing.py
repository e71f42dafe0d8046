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
        "what replaces them: uniformly drawn tokens, or the model's own predictions (one more forward per step)",
        choices=("uniform", "model"),
    )
    keep_share: float = key(
        1.0, "with editing, share of the unchanged visible response tokens that are targets too", low=0.0, high=1.0
    )
    num_turns: int = key(
        1,
        "turns of each view: the next turn shows the model's draft of this one, in the same packed sequence (each costs one "
        "more forward per step)",
        low=1,
    )
    draft_share: float = key(
        0.5, "share of the targets that show the draft in the next turn; the others stay as they are", low=0.0, high=1.0
    )
    draft_threshold: Optional[float] = key(
        None,
        "instead of a share: targets show the draft if its probability exceeds this, as in decoding",
        low=0.0,
        high=1.0,
    )
