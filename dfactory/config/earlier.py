"""A recipe of the earlier dFactory becomes one of this: each key is translated, or left out because nothing here needs it,
or refused by name with what to do instead. The tables are in earlier_keys.py.
"""

import difflib
from collections.abc import Iterator
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from dfactory.config.earlier_keys import CONVERTED, IMPLIED, LEFT_OUT, ONLY, RENAMED
from dfactory.errors import ConfigError

SECTIONS = ("model", "data", "train")
Layers = list[tuple[str, DictConfig]]  # (where it comes from, its keys), later ones over earlier ones
Given = dict[str, Any]  # old key -> value
New = Iterator[tuple[str, str, Any]]  # old key, what it became, value


class Alias(NamedTuple):
    """One line of the printed table. `old` is empty where a default of the earlier code is meant, `new` where nothing is."""

    old: str
    new: str
    note: str = ""


def translate(layers: Layers, ranks: int) -> tuple[Layers, list[Alias]]:
    """The layers without the earlier sections, and what became of each key. Raises ConfigError for keys that are dead,
    unknown, or given in both languages with different values. `ranks` is what global_batch_size is divided over."""
    given: Given = {}
    layer_of: dict[str, int] = {}
    for index, (origin, layer) in enumerate(layers):
        for name, value in _sections(layer).items():
            _refuse(name, value, origin)
            given[name], layer_of[name] = value, index
    if not given:
        return layers, []
    flat = OmegaConf.merge(*(_without_sections(layer) for _, layer in layers))
    news: list[dict[str, Any]] = [{} for _ in layers]
    became: dict[str, list[str]] = {}
    for old, new, value in _translations(given, flat, ranks):
        news[layer_of[old]][new] = value
        became.setdefault(old, []).append(f"{new} = {_text(value)}")
    aliases = [Alias(f"{old} = {_text(value)}", *_told(old, became.get(old, []))) for old, value in given.items()]
    if 0 in layer_of.values():
        implied = {
            name: it for name, it in IMPLIED.items() if name not in flat and not any(name in new for new in news)
        }
        news[0] |= {name: value for name, (value, _) in implied.items()}
        aliases += [Alias("", f"{name} = {_text(value)}", why) for name, (value, why) in implied.items()]
    return [_with(origin, layer, new) for (origin, layer), new in zip(layers, news, strict=True)], aliases


def _sections(layer: DictConfig) -> Given:
    """`train.lr` and so on -> value, of the sections that are mappings."""
    plain = OmegaConf.to_container(layer)
    return {
        f"{section}.{name}": value
        for section in SECTIONS
        if isinstance(plain.get(section), dict)
        for name, value in plain[section].items()
    }


def _without_sections(layer: DictConfig) -> DictConfig:
    return OmegaConf.create(
        {name: layer[name] for name in layer if not (name in SECTIONS and OmegaConf.is_dict(layer[name]))}
    )


def _with(origin: str, layer: DictConfig, new: Given) -> tuple[str, DictConfig]:
    own = _without_sections(layer)
    for name in set(own) & set(new):
        if own[name] != new[name]:
            raise ConfigError(
                f"{origin} says {name} {_text(own[name])}, and {_text(new[name])} by an earlier key: keep one"
            )
    return origin, OmegaConf.merge(OmegaConf.create(new), own)


def _refuse(name: str, value: Any, origin: str) -> None:
    if name in ONLY:
        values, otherwise = ONLY[name]
        if value not in values:
            raise ConfigError(f"{name} {_text(value)} in {origin} cannot be had: {otherwise}")
    elif name not in every_name():
        bare = {known.partition(".")[2]: known for known in every_name()}
        near = [bare[match] for match in difflib.get_close_matches(name.partition(".")[2], bare, n=1, cutoff=0.6)]
        new = f", here {RENAMED[near[0]]}" if near and near[0] in RENAMED else ""
        hint = (
            f"; did you mean {near[0]}{new}?"
            if near
            else "; `dfactory schema --earlier` lists the keys of that dFactory"
        )
        raise ConfigError(f"unknown key {name} in {origin}{hint}")


def every_name() -> list[str]:
    return [*RENAMED, *CONVERTED, *LEFT_OUT, *ONLY]


def _told(old: str, became: list[str]) -> tuple[str, str]:
    """What a key became, and a note."""
    if became:
        return ", ".join(became), CONVERTED.get(old, "")
    if old in ONLY:
        return "the same", "the only way here"
    return ("as the note says", CONVERTED[old]) if old in CONVERTED else ("left out", LEFT_OUT[old])


def _text(value: Any) -> str:
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )


# --- what is more than a name -----------------------------------------------------------------------------------------


def _translations(given: Given, flat: DictConfig, ranks: int) -> New:
    yield from ((old, RENAMED[old], value) for old, value in given.items() if old in RENAMED)
    yield from _files(given)
    yield from _accumulation(given, flat, ranks)
    yield from _values(given)
    yield from _intervals(given, flat)
    if "deepspeed" not in flat:
        yield from _sharding(given)


def _files(given: Given) -> New:
    for old, new in (("data.train_path", "datasets"), ("data.eval_path", "eval_datasets")):
        if given.get(old):
            paths = [path.strip() for path in str(given[old]).split(",")]
            if paths[0].endswith((".yaml", ".yml")):
                raise ConfigError(
                    f"{old} {paths[0]}: name the files of a mixture in {new}, [{{path: a.jsonl, weight: 0.5}}]"
                )
            yield old, new, [{"path": path} for path in paths]


def _accumulation(given: Given, flat: DictConfig, ranks: int) -> New:
    old = "train.global_batch_size"
    if given.get(old) is None:
        return
    rows = int(given.get("train.micro_batch_size") or flat.get("per_device_train_batch_size") or 1)
    if given[old] % (rows * ranks):
        raise ConfigError(
            f"{old} {given[old]} is not a multiple of {rows} row(s) a micro-batch x {ranks} rank(s): change one of them"
        )
    yield old, "gradient_accumulation_steps", given[old] // (rows * ranks)


def _values(given: Given) -> New:
    if (weight := given.get("train.confidence_beta")) is not None:
        yield "train.confidence_beta", "stage", "cap" if weight > 0 else "sft"
        if weight > 0:
            yield "train.confidence_beta", "confidence_beta", weight
    tokenizer = given.get("model.tokenizer_path")
    if tokenizer not in (None, given.get("model.model_path"), given.get("model.config_path")):
        raise ConfigError(
            f"model.tokenizer_path {tokenizer} cannot be had: it is read from model_name_or_path; put its files there"
        )
    if "train.enable_mixed_precision" in given:
        yield "train.enable_mixed_precision", "dtype", "bfloat16"
    if "train.use_wandb" in given:
        yield "train.use_wandb", "report_to", ["wandb"] if given["train.use_wandb"] else []
    if "train.load_checkpoint_path" in given:
        path = given["train.load_checkpoint_path"]
        yield "train.load_checkpoint_path", "resume_from_checkpoint", {"auto": True}.get(path, path or False)


def _intervals(given: Given, flat: DictConfig) -> New:
    """Checkpoints and evaluations: every so many steps, or epochs, 0 being never."""
    for what in ("save", "eval"):
        steps, epochs = f"train.{what}_steps", f"train.{what}_epochs"
        if steps in given:
            yield steps, f"{what}_steps", given[steps] or None
        often = given.get(steps) or flat.get(f"{what}_steps")
        run = given.get("train.num_train_epochs", flat.get("num_train_epochs", 1))
        if given.get(epochs) and given[epochs] < run and not often:
            raise ConfigError(
                f"{epochs} {given[epochs]} in a run of {run} epochs: steps are counted here; use {what}_steps "
                "(`dfactory check` tells the steps of an epoch)"
            )


def _sharding(given: Given) -> New:
    names = ("train.data_parallel_mode", "train.enable_full_shard", "train.enable_fsdp_offload")
    told = [name for name in names if name in given]
    if not told:
        return
    stage = 3 if given.get("train.enable_full_shard", True) else 2
    if given.get("train.data_parallel_mode", "ddp") == "ddp":
        stage = 1
    zero: Given = {"stage": stage, "contiguous_gradients": True, "overlap_comm": True}
    if given.get("train.enable_fsdp_offload"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    yield told[0], "deepspeed_overrides", {"zero_optimization": zero}
