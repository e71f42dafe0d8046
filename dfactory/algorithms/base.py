"""Algorithm: what a recipe's `stage` (and in reinforcement learning its `policy_loss`) selects.

An algorithm says what it learns from, which keys it has and which rules hold between them, what it needs beside the scores
of the policy, and makes the objective. The engine, the memory forecast, `check` and the sources of batches ask it; nobody
else knows its name.
"""

import dataclasses
import enum
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from dfactory.errors import ConfigError
from dfactory.seams import Table
from dfactory.types import Objective


class Data(enum.Enum):
    """What an algorithm learns from."""

    RECORDS = "records"  # documents as they are
    PAIRS = "pairs"  # a chosen and a rejected answer to one prompt, side by side in a row
    PROMPTS = "prompts"  # what the policy itself answers to them, with rewards

    @property
    def documents_per_record(self) -> int:
        return 2 if self is Data.PAIRS else 1


@dataclasses.dataclass(frozen=True)
class Needs:
    """What an objective reads beside the scores of the policy in training."""

    reference: bool = False
    """Scores of the model that the run starts from: `reference_elbo_D` of pairs, `reference_logprob_N` of rollouts."""
    old_logprob: bool = False
    """The log-probabilities of a rollout's targets before the first step on it: `old_logprob_N`, and `fresh_N`."""
    takes_ratio_1: bool = False
    """Whether a batch may lack `old_logprob_N` where it is the detached log-probability of the training forward itself."""
    entropy_temperature: float | None = None
    """A gradient through the entropies of softmax(logits / this); None: entropies are only logged."""


@dataclasses.dataclass
class NoKeys:
    """Of an algorithm without keys of its own."""


class Algorithm:
    """The base of all algorithms; an instance goes into `ALGORITHMS`. It holds no state: every method gets the recipe, with
    all keys (dfactory/recipe.py)."""

    name: ClassVar[str]
    summary: ClassVar[str]  # what it does, in a line, for docs and `schema`
    source: ClassVar[str] = ""  # the paper or equation
    data: ClassVar[Data] = Data.RECORDS
    Keys: ClassVar[type] = NoKeys
    default_of: ClassVar[str | None] = None  # the selecting key whose default it is
    weighs_records: ClassVar[bool] = (
        False  # whether its objective reads `weight_D`; else records with a weight are refused
    )

    @property
    def selects(self) -> dict[str, str]:
        """The keys of a recipe that select it, with their values."""
        return {"stage": self.name}

    @property
    def selector(self) -> str:
        """The last of them, as messages name it."""
        key, value = list(self.selects.items())[-1]
        return f"{key} {value}"

    @property
    def wide_selector(self) -> str:
        """The first of them: all algorithms of reinforcement learning have it in common."""
        return " ".join(next(iter(self.selects.items())))

    def problems(self, recipe: Any) -> Iterator[str]:
        """The rules between keys that a recipe breaks, each as `key value ...: the rule; the remedy`."""
        yield from ()

    def warnings(self, recipe: Any) -> Iterator[str]:
        """What `check` says of combinations that are allowed and rarely wanted."""
        yield from ()

    def needs(self, recipe: Any) -> Needs:
        return Needs()

    def dividing_key(self, recipe: Any) -> str | None:
        """The key and value, if any, because of which targets weigh 1 / t, so that t must not be 0."""
        return None

    def objective(self, recipe: Any, editing_mask_id: int | None) -> Objective:
        """The arithmetic. `editing_mask_id` is the mask's id where visible tokens are targets too, else None."""
        raise NotImplementedError


ALGORITHMS: Table[Algorithm] = Table("algorithm", "dfactory.algorithms", "dfactory.algorithms")


def selected(recipe: Any) -> Algorithm:
    """The algorithm of a recipe, whose selecting keys have been checked against the table."""
    return next(a for a in ALGORITHMS if all(getattr(recipe, key) == value for key, value in a.selects.items()))


def choices_of(key: str) -> dict[str, Algorithm]:
    """The values that a selecting key may take, with an algorithm for each: a default one where there are several."""
    choices: dict[str, Algorithm] = {}
    for algorithm in sorted(ALGORITHMS, key=lambda algorithm: algorithm.default_of is None):
        if key in algorithm.selects:
            choices.setdefault(algorithm.selects[key], algorithm)
    return dict(sorted(choices.items()))


def default_of(key: str) -> str:
    """The default of a selecting key."""
    return next(algorithm.selects[key] for algorithm in ALGORITHMS if algorithm.default_of == key)


def refuse_other_selections(recipe: Any, origins: Mapping[str, str]) -> None:
    """Raise ConfigError for a selecting key that was given (`origins`: key -> where) and selects nothing here."""
    mine = selected(recipe).selects
    for algorithm in ALGORITHMS:
        for name in algorithm.selects:
            if name in origins and name not in mine and getattr(recipe, name) != default_of(name):
                raise ConfigError(
                    f"{name} in {origins[name]} belongs to {algorithm.wide_selector}, and this is "
                    f"{selected(recipe).selector}: leave it out"
                )
