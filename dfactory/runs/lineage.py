"""What a model was made from, as data: `dfactory.json` in every checkpoint and every export.

    base       what the first run started from: its name, revision or the SHA-256 of its weights, licence
    history    what was done with it, oldest first: trainings (recipe, data, steps, versions, numbers) and exports

A run whose model is a checkpoint or an export of an earlier one goes on with that one's history. Nothing in the file says
where on a machine things lay, and secrets are left out (redaction.shareable): it goes wherever the model goes. What is
not known is null. A file of this name that is not ours counts as none.
"""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any

from dfactory.errors import CheckpointError

FILE = "dfactory.json"
FORMAT = "dfactory-lineage-1"
LARGEST = 1 << 25  # bytes: a file from elsewhere is not read into memory whatever its size

EMBEDDED, HUB, GGUF, DIRECTORY, RANDOM = "embedded", "hub", "gguf", "directory", "random"
TRAINED_ON, HELD_OUT = "training", "held out"


@dataclasses.dataclass(frozen=True)
class Licence:
    """As the card of a model states it. None: unknown."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None


@dataclasses.dataclass(frozen=True)
class Base:
    """A model that was not made by a run whose history is known."""

    kind: str  # embedded, hub, gguf, directory, or random: drawn by its configuration
    name: str
    revision: str | None = None
    weights: dict[str, str] = dataclasses.field(default_factory=dict)  # file -> SHA-256; empty: not hashed
    licence: Licence = Licence()
    language: list[str] = dataclasses.field(default_factory=list)
    has_card: bool = False
    gguf: dict[str, str] = dataclasses.field(default_factory=dict)  # file, sha256, quantisation
    adapters_of: "Base | None" = None  # for LoRA adapters: the model below them


@dataclasses.dataclass(frozen=True)
class Source:
    """The model that an entry of a history started from."""

    name: str
    revision: str | None = None  # on the hub
    weights: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Records:
    """An entry of `datasets` or `eval_datasets`."""

    name: str
    use: str  # training or held out
    weight: float = 1.0
    rows: int | None = None
    sha256: str | None = None
    note: str = ""  # why there is no sum
    on_hub: bool = False
    config: str | None = None
    split: str | None = None
    revision: str | None = None  # the commit that was read, else what the recipe asked for


@dataclasses.dataclass(frozen=True)
class Result:
    """A number of an evaluation, with its 95 percent interval where there is one."""

    metric: str
    value: float
    part: str = ""  # a task, or a value of a decode key; empty: all
    low: float | None = None
    high: float | None = None
    records: int | None = None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `dfactory eval` found."""

    step: int  # of the checkpoint
    date: str
    command: str
    data: str
    sha256: str | None = None
    decode: dict[str, Any] = dataclasses.field(default_factory=dict)
    results: list[Result] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Earlier:
    """A recipe that a run had up to a step where it was resumed with another."""

    until_step: int
    recipe: str


@dataclasses.dataclass(frozen=True)
class Training:
    """A run, up to one of its checkpoints."""

    stage: str
    run: str  # the name of its folder
    source: Source
    recipe: str  # YAML, resolved
    step: int
    earlier_recipes: list[Earlier] = dataclasses.field(default_factory=list)
    tokens: int | None = None  # positions that held a token
    seconds: float | None = None  # in training steps
    records: list[Records] = dataclasses.field(default_factory=list)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    hardware: list[str] = dataclasses.field(default_factory=list)  # one, or more where it was resumed on another
    first_evaluated: dict[str, float] = dataclasses.field(
        default_factory=dict
    )  # metrics.jsonl without `eval/`, and step
    last_evaluated: dict[str, float] = dataclasses.field(default_factory=dict)
    evaluations: list[Evaluation] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Averaged:
    """A checkpoint that a merge took, and its value of the metric."""

    checkpoint: str
    value: float


@dataclasses.dataclass(frozen=True)
class Export:
    """A directory that `dfactory export` wrote."""

    name: str
    source: Source
    dtype: str
    version: str  # of dFactory
    merged_adapters: bool = False
    metric: str | None = None  # by which the averaged checkpoints were chosen
    averaged: list[Averaged] = dataclasses.field(default_factory=list)
    license: str | None = None  # stated by whoever exported
    weights: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Lineage:
    """A model's base and history."""

    base: Base
    history: tuple[Training | Export, ...] = ()

    @property
    def trainings(self) -> list[Training]:
        return [entry for entry in self.history if isinstance(entry, Training)]

    @property
    def licence(self) -> Licence:
        """The one that the last export stated, else that of the base."""
        stated = [e.license for e in self.history if isinstance(e, Export) and e.license is not None]
        return Licence(stated[-1]) if stated else self.base.licence

    def then(self, entry: Training | Export) -> "Lineage":
        return dataclasses.replace(self, history=(*self.history, entry))

    def text(self) -> str:
        """The contents of the file."""
        history = [{_name(type(entry)): dataclasses.asdict(entry)} for entry in self.history]
        whole = {"format": FORMAT, "base": dataclasses.asdict(self.base), "history": history}
        return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


ENTRIES = (Training, Export)


def read_lineage(model_dir: Path) -> Lineage | None:
    """What the file of a directory says; None where there is none, or another program's.

    Raises CheckpointError where ours is damaged.
    """
    file = model_dir / FILE
    if not file.is_file():
        return None
    if file.stat().st_size > LARGEST:
        raise _damaged(file, f"it has more than {LARGEST:,} bytes")
    try:
        raw = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as problem:
        raise _damaged(file, f"it is not JSON ({problem})") from problem
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        return None
    try:
        history = tuple(_entry(one) for one in from_json(list[dict[str, Any]], raw.get("history"), "history"))
        return Lineage(from_json(Base, raw.get("base"), "base"), history)
    except (TypeError, RecursionError) as problem:
        raise _damaged(file, str(problem)) from problem


def _damaged(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{file} is no lineage of a model: {why}; copy it again, or remove it to go on without it")


def _name(kind: type) -> str:
    return kind.__name__.lower()


def _entry(raw: dict[str, Any]) -> Training | Export:
    for kind in ENTRIES:
        if list(raw) == [_name(kind)]:
            return from_json(kind, raw[_name(kind)], _name(kind))
    raise TypeError(f"history holds {str(list(raw))[:100]}, which is none of {', '.join(map(_name, ENTRIES))}")


def from_json(kind: Any, raw: Any, where: str) -> Any:
    """A value of JSON as a type: a dataclass, a list, a mapping, a union or a plain type. Raises TypeError that names the
    place of another value. Fields that a later version added are left out."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return raw
    if isinstance(kind, types.UnionType) or origin is typing.Union:
        (one,) = (option for option in inner if option is not type(None))
        return None if raw is None else from_json(one, raw, where)
    if dataclasses.is_dataclass(kind) and isinstance(raw, dict):
        return _object(kind, raw, where)
    if origin is list and isinstance(raw, list):
        return [from_json(inner[0], one, f"{where}[{index}]") for index, one in enumerate(raw)]
    if origin is dict and isinstance(raw, dict):
        return {name: from_json(inner[1], one, f"{where}.{name[:50]}") for name, one in raw.items()}
    if kind is float and type(raw) in (int, float):
        return float(raw)
    if not isinstance(kind, type) or type(raw) is not kind:
        raise TypeError(f"{where} is {str(raw)[:100]!r}")
    return raw


def _object(kind: type, raw: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    given = {name: from_json(hints[name], raw[name], f"{where}.{name}") for name in hints if name in raw}
    required = {f.name for f in dataclasses.fields(kind) if _has_no_default(f)}
    if missing := sorted(required - given.keys()):
        raise TypeError(f"{where} lacks {', '.join(missing)}")
    return kind(**given)


def _has_no_default(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
