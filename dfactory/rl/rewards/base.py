"""What a reward is: a function with TRL's signature, and what has to be known of it before it is called.

    def politeness(prompts, completions, *, word="please", **columns) -> list[float | None]:
        return [float(word in completion_text(completion)) for completion in completions]

    REWARDS.add(Reward(politeness))

A reward lives in one file of this package, or in a package of one's own with an entry point in the group `dfactory.rewards`
that names that module or the Reward. A recipe's `reward_funcs` then takes the function's name. Nothing here imports torch,
and no file imports an extra at its top: all of them are read where a recipe is checked, and in every reward process.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from dfactory.seams import Table


@dataclass(frozen=True)
class Reward:
    """An entry of REWARDS. Its name is the function's; its options are the function's keyword-only parameters."""

    function: Callable
    per_rollout: bool = False  # call it once per rollout: one that hangs then costs only that rollout
    runs_code: bool = False  # it runs what the model writes, so the recipe has to say allow_code_execution
    requires: tuple[str, ...] = ()  # packages of the extra `rl` that the function imports when it is called

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def module(self) -> str:
        return self.function.__module__

    def load(self) -> Callable:
        """The function, with the packages that it requires imported. Raises ImportError if one is missing."""
        for package in self.requires:
            importlib.import_module(package)
        return self.function


REWARDS: Table[Reward] = Table("reward", "dfactory.rl.rewards", "dfactory.rewards")
