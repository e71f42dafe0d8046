"""dFactory: post-training of block-diffusion language models.

    pipeline = dfactory.Pipeline("runs/mine", threshold=0.9)
    answers = pipeline.generate(["Once upon a time"])             # list[Answer]; also .chat and .stream

    policy = dfactory.load_policy("runs/mine")
    scores = policy.score(batch)                                  # ViewBatch -> TokenScores
    rollouts = dfactory.decode(policy, [prompt_ids], rules)       # list[Rollout]

`dfactory.noise` and `dfactory.packing.collate` build a ViewBatch, also from masks of one's own. Nothing heavy is
imported before it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from dfactory.versions import version_of

if TYPE_CHECKING:  # what __getattr__ imports, for type checkers and editors
    from dfactory import noise, views
    from dfactory.decoding import DecodeRules, decode
    from dfactory.inference import Pipeline
    from dfactory.models.policy import Policy
    from dfactory.models.registry import load_policy
    from dfactory.types import Answer

_WHERE = {
    "Answer": "dfactory.types",
    "Pipeline": "dfactory.inference",
    "load_policy": "dfactory.models.registry",
    "Policy": "dfactory.models.policy",
    "decode": "dfactory.decoding",
    "DecodeRules": "dfactory.decoding",
}
_MODULES = ("noise", "views")

__all__ = ["Answer", "DecodeRules", "Pipeline", "Policy", "decode", "load_policy", "noise", "views"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version_of("dfactory")
    if name in _MODULES:
        return importlib.import_module(f"dfactory.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'dfactory' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
