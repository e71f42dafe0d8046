"""From the recipe's `reward_funcs` to functions: names, weights, options, and the columns that a function needs.

    reward_funcs:
      - exact_match                                        # builtin, or of a package (base.py)
      - trl.rewards.think_format_reward                    # dotted path
      - {name: rewards.py:politeness, weight: 0.2}         # file, relative to the recipe
      - {name: length_shaping, weight: 0.5, max_length: 256, cache: 64}

A mapping may say `per_rollout: true`: call the function for every rollout on its own, where it needs no others of the group.
`parse_rewards` runs where the recipe is read and imports none of the functions that a recipe brings; `load_reward` runs in
the reward processes.
"""

import difflib
import functools
import importlib.util
import inspect
import itertools
import pkgutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfactory.errors import ConfigError
from dfactory.redaction import remember
from dfactory.rl.rewards.base import REWARDS, Reward

PROVIDED = {
    *("prompts", "completions", "completion_ids", "tokens_per_forward", "forwards", "finish_reason"),
    *("log_metric", "log_extra"),
}  # what every reward function gets beside the columns of the row


@dataclass(frozen=True)
class RewardSpec:
    """One entry of `reward_funcs`."""

    name: str  # in metrics and messages; unique
    target: str  # name in REWARDS, dotted path, or absolute/path.py:function
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    per_rollout: bool = False  # call it for each rollout on its own: in parallel, and a hang costs one rollout


def parse_rewards(
    reward_funcs: Sequence[str | dict],
    reward_weights: Sequence[float] | None = None,
    *,
    base: str | Path = ".",
    allow_code_execution: bool = False,
) -> list[RewardSpec]:
    """Check the recipe's entries. `base` is the folder that file names are relative to. Raises ConfigError."""
    if not reward_funcs:
        raise ConfigError(f"reward_funcs is empty: name at least one, such as {' | '.join(REWARDS.names)}")
    entries = [{"name": entry} if isinstance(entry, str) else dict(entry) for entry in reward_funcs]
    if reward_weights is not None:
        _refuse_weights(entries, reward_weights)
        entries = [entry | {"weight": weight} for entry, weight in zip(entries, reward_weights, strict=True)]
    specs: list[RewardSpec] = []
    for entry in entries:
        target = _check_target(entry.pop("name", None), Path(base))
        reward = _declared(target)
        if reward is not None and reward.runs_code and not allow_code_execution:
            raise ConfigError(f"reward {target} runs what the model writes: set allow_code_execution: true")
        weight = entry.pop("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise ConfigError(f"reward {target}: weight {weight!r} is not a number")
        per_rollout = bool(entry.pop("per_rollout", reward is not None and reward.per_rollout))
        remember(entry)
        specs.append(RewardSpec(_unique_name(target, specs), target, float(weight), entry, per_rollout))
    return specs


def load_reward(spec: RewardSpec) -> Callable:
    """The function, with its options bound. Raises ConfigError, or whatever the user's module raises on import."""
    function = _resolve(spec.target)
    if not callable(function):
        raise ConfigError(f"reward {spec.target} is a {type(function).__name__}: name a function")
    options = _options_of(function)
    for name in spec.options:
        if name not in options:
            near = difflib.get_close_matches(name, options, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(options) or 'none'}"
            raise ConfigError(f"reward {spec.target} has no option {name}: {hint}")
    _refuse_positional(spec, function)
    if (prepare := getattr(function, "prepare", None)) is not None:
        prepare(**spec.options)
    return functools.partial(function, **spec.options)


def taken(function: Callable, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that a loaded reward takes: all of them, or what it names where it has no **columns."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return arguments
    return {p.name: arguments[p.name] for p in parameters if p.name in arguments}


def row_problem(spec: RewardSpec, function: Callable, row: dict[str, Any]) -> str | None:
    """Why a loaded reward cannot score answers to this row of the data; None if it can, as far as a look at it tells."""
    if missing := [name for name in required_columns(function) if name not in row]:
        return f"reward {spec.name} asks for the column {missing[0]}, which the row does not have"
    check = getattr(getattr(function, "func", function), "check_row", None)
    try:
        return check(row | spec.options) if check is not None else None
    except ValueError as problem:
        return f"reward {spec.name}: {problem}"


def required_columns(function: Callable) -> list[str]:
    """Columns without which a loaded reward cannot be called: checked against the data before a run starts."""
    parameters = inspect.signature(function).parameters.values()
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]
    return [name for name in needed if name not in PROVIDED]


def _refuse_positional(spec: RewardSpec, function: Callable) -> None:
    """Rewards are called by keywords only."""
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise ConfigError(
                f"reward {spec.target} takes {parameter.name} by its place only, but rewards are called by keywords: write "
                f"def {spec.name}(prompts, completions, **columns)"
            )


def _options_of(function: Callable) -> list[str]:
    named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in named and p.name not in ("prompts", "completions")]


def _resolve(target: str) -> Any:
    if ":" in target:
        return _from_file(*target.rsplit(":", 1))
    reward = _declared(target)
    try:
        return pkgutil.resolve_name(target) if reward is None else reward.load()
    except (ImportError, AttributeError) as problem:
        remedy = "pip install 'dfactory[rl]'" if reward is not None else "a dotted path is package.module.function"
        raise ConfigError(f"reward {target}: {problem}: {remedy}") from problem


def _from_file(path: str, name: str) -> Callable:
    module_name = f"dfactory_reward_{Path(path).stem}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    module_spec.loader.exec_module(module)
    if name not in vars(module):
        near = difflib.get_close_matches(name, vars(module), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"reward {path}:{name}: the file has no {name}{hint}")
    return vars(module)[name]


def _check_target(name: Any, base: Path) -> str:
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"reward_funcs: name {name!r} is not text: give a builtin, pkg.module.function or file.py:name"
        )
    if ":" in name:
        path, function = name.rsplit(":", 1)
        file = (base / path).resolve()
        if file.suffix != ".py" or not function.isidentifier():
            raise ConfigError(f"reward {name}: files are named as path/to/file.py:function")
        if not file.is_file():
            raise ConfigError(f"reward {name}: {file} does not exist")
        return f"{file}:{function}"
    if "." not in name and name not in REWARDS:
        near = difflib.get_close_matches(name, REWARDS.names, n=1)
        hint = f"did you mean {near[0]}?" if near else _listed()
        raise ConfigError(f"reward {name} is not known: {hint}")
    return name


def _declared(target: str) -> Reward | None:
    """The table's entry of that name, None for a dotted path or a file."""
    return next((reward for reward in REWARDS if reward.name == target), None)


def _listed() -> str:
    """What the table holds, for a message."""
    builtin = [reward.name for reward in REWARDS if reward.module.startswith(f"{REWARDS.package}.")]
    added = [name for name in REWARDS.names if name not in builtin]
    return f"builtin are {', '.join(builtin)}" + (f"; installed packages add {', '.join(added)}" if added else "")


def _refuse_weights(entries: list[dict], weights: Sequence[float]) -> None:
    if len(weights) != len(entries):
        raise ConfigError(f"reward_weights has {len(weights)} numbers for {len(entries)} reward_funcs: give one each")
    both = [entry["name"] for entry in entries if "weight" in entry]
    if both:
        raise ConfigError(f"reward {both[0]} has a weight of its own beside reward_weights: give one of the two")


def _unique_name(target: str, earlier: list[RewardSpec]) -> str:
    """The function's name, as TRL's metrics have it; a second one of that name gets a number."""
    name = target.replace(":", ".").rsplit(".", 1)[-1]
    taken = {spec.name for spec in earlier}
    names = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(2)))
    return next(free for free in names if free not in taken)
