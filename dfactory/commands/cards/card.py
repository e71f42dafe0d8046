"""The model card that every export gets: README.md with the front matter of the hub, from the model's lineage.

All of it comes from dfactory.json, the directory and the evaluations that are recorded. What is not known is written as
unknown. Texts that came with a model are shown as text (markdown.py). The layout is assets/card.md.jinja.
"""

from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from dfactory.commands.cards.markdown import FILTERS, UNKNOWN, code, plain
from dfactory.commands.cards.usage import recipe_keys, usage
from dfactory.hub import is_hub_name
from dfactory.models.families.base import Attention
from dfactory.models.registry import read_family
from dfactory.runs.lineage import (
    DIRECTORY,
    EMBEDDED,
    FILE,
    GGUF,
    HUB,
    RANDOM,
    TRAINED_ON,
    Base,
    Evaluation,
    Export,
    Lineage,
    Result,
    Training,
)
from dfactory.runs.provenance import CARD
from dfactory.versions import version_of

TEMPLATE = Path(__file__).parents[2] / "assets/card.md.jinja"
TASK = "text-generation"


def write_card(model_dir: Path, name: str, lineage: Lineage) -> None:
    """Write the lineage and the card of a model into its directory, whose name will be `name`."""
    (model_dir / FILE).write_text(lineage.text())
    ModelCard(card_text(model_dir, name, lineage)).save(model_dir / CARD)


def card_text(model_dir: Path, name: str, lineage: Lineage) -> str:
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= FILTERS
    body = environment.from_string(TEMPLATE.read_text()).render(
        name=name,
        summary=_summary(name, lineage),
        usage=usage(model_dir, name, lineage),
        base=_base(lineage.base),
        trainings=lineage.trainings,
        notes=[_export(entry) for entry in lineage.history if isinstance(entry, Export)],
        results=_results(lineage),
        licence=_licence(lineage),
        limits=_limits(lineage),
        lineage_file=FILE,
        version=version_of("dfactory"),
    )
    front = _front(model_dir, name, lineage)
    return f"---\n{front.to_yaml()}\n---\n\n{body}"


# --- front matter ------------------------------------------------------------------------------------------------------


def _front(model_dir: Path, name: str, lineage: Lineage) -> ModelCardData:
    """Ids of the hub only where they are known to be some."""
    licence, family = lineage.licence, read_family(model_dir)
    blocks = ["block-diffusion"] if family.attention is not Attention.FULL else []
    stages = list(dict.fromkeys(training.stage for training in lineage.trainings))
    merged = ["merge"] if any(isinstance(entry, Export) and entry.averaged for entry in lineage.history) else []
    sets = [
        entry.name for run in lineage.trainings for entry in run.records if entry.on_hub and entry.use == TRAINED_ON
    ]
    results = _eval_results(lineage)
    return ModelCardData(
        license=(licence.license or UNKNOWN).lower(),
        license_name=licence.license_name,
        license_link=licence.license_link,
        base_model=_nearest_on_hub(lineage),
        library_name="transformers",
        pipeline_tag=TASK,
        tags=["dfactory", "diffusion-language-model", *blocks, family.name, *stages, *merged],
        datasets=list(dict.fromkeys(sets)) or None,
        language=lineage.base.language or None,
        model_name=name if results else None,
        eval_results=results or None,
    )


def _nearest_on_hub(lineage: Lineage) -> str | None:
    """The model of the hub that the last part of the history started from."""
    named = [(entry.source.name, entry.source.revision) for entry in lineage.history]
    named.insert(0, (lineage.base.name, lineage.base.revision))
    below = lineage.base.adapters_of
    if below is not None:
        named.insert(0, (below.name, below.revision))
    return next((name for name, revision in reversed(named) if revision and is_hub_name(name)), None)


def _eval_results(lineage: Lineage) -> list[EvalResult]:
    """Numbers of all records of each evaluation of the last run."""
    evaluations = lineage.trainings[-1].evaluations if lineage.trainings else []
    return [
        EvalResult(TASK, evaluation.data, evaluation.data, result.metric, result.value)
        for evaluation in evaluations
        for result in evaluation.results
        if not result.part
    ]


# --- text --------------------------------------------------------------------------------------------------------------


def _summary(name: str, lineage: Lineage) -> str:
    stages = [code(training.stage) for training in lineage.trainings]
    made = f"trained in {len(stages)} stage(s), {', '.join(stages)}" if stages else "not trained further"
    return (
        f"{plain(name)} is a diffusion language model: it fills in masked or noised tokens, several at a time. It was made "
        f"by dFactory from {_called(lineage.base)} and {made}."
    )


def _called(base: Base) -> str:
    if base.kind == RANDOM:
        return f"random weights, drawn by the configuration of {code(base.name)}"
    if base.kind == HUB and is_hub_name(base.name):
        return f"[{plain(base.name)}](https://huggingface.co/{base.name})"
    return code(base.name)


def _base(base: Base) -> str:
    words = {
        EMBEDDED: "the base model of 1.3 million parameters that dFactory contains",
        GGUF: "read from a GGUF file",
        DIRECTORY: "a local model directory",
        RANDOM: "no weights were read",
    }
    told = [f"The base is {_called(base)}" + (f", {words[base.kind]}." if base.kind in words else ".")]
    if base.revision:
        told.append(f"Its commit is {code(base.revision)}.")
    if base.gguf:
        told.append("The file: " + ", ".join(f"{plain(what)} {code(value)}" for what, value in base.gguf.items()) + ".")
    told += [f"SHA-256 of {code(file)}: {code(sha256)}." for file, sha256 in base.weights.items()]
    if base.kind != HUB and not base.weights and base.kind != RANDOM and not base.gguf:
        told.append("Its weights were not hashed.")
    if base.has_card:
        told.append("It has a card of its own, which is not repeated here.")
    if base.adapters_of is not None:
        told.append(f"It is LoRA adapters. {_base(base.adapters_of)}")
    return " ".join(told)


def _export(entry: Export) -> str:
    told = f"Exported from {code(entry.source.name)} as {code(entry.name)} in {code(entry.dtype)}."
    if entry.averaged:
        chosen = ", ".join(f"{code(one.checkpoint)} ({one.value:.6g})" for one in entry.averaged)
        told += (
            f" The weights are the mean of {len(entry.averaged)} checkpoint(s), best by {code(entry.metric)}: {chosen}."
        )
    if entry.merged_adapters:
        told += " LoRA adapters are merged into the weights."
    return told


def _results(lineage: Lineage) -> list[dict[str, Any]]:
    """The evaluations of every run, those of the last one first."""
    return [
        vars(evaluation) | _table(evaluation) | {"of": _of(run, evaluation.step, run is lineage.trainings[-1])}
        for run in reversed(lineage.trainings)
        for evaluation in run.evaluations
    ]


def _table(evaluation: Evaluation) -> dict[str, Any]:
    """A row for each part of the questions, a column for each metric."""
    parts: dict[str, dict[str, Result]] = {}
    for result in evaluation.results:
        parts.setdefault(result.part, {})[result.metric] = result
    metrics = list(dict.fromkeys(result.metric for result in evaluation.results))
    decoded_by = ", ".join(code(f"{key}={value}") for key, value in evaluation.decode.items()) or UNKNOWN
    return {"parts": parts, "metrics": metrics, "decoded_by": decoded_by}


def _of(run: Training, step: int, is_last: bool) -> str:
    where = f"{code(f'checkpoint-{step}')} of {code(run.run)}"
    return f"measured on {where}" if is_last else f"measured on {where}, an earlier stage"


def _licence(lineage: Lineage) -> str:
    known = lineage.licence
    if known.license is None:
        return (
            "Unknown: neither what the model was made from states one, nor did whoever exported it. Find out before you use "
            "it or pass it on."
        )
    stated = known is not lineage.base.licence
    more = "".join(f", {plain(text)}" for text in (known.license_name, known.license_link) if text)
    return f"{code(known.license)}{more}, as {'stated at the export' if stated else 'the base states'}."


def _limits(lineage: Lineage) -> list[str]:
    recipe = recipe_keys(lineage)
    found = ["What is known of its quality stands above. No test of safety, bias or truthfulness is recorded."]
    if type(recipe.get("max_length")) is int:
        found.append(
            f"It was trained on documents of up to {recipe['max_length']:,} tokens, prompt and answer together."
        )
    if any(entry.averaged for entry in lineage.history if isinstance(entry, Export)):
        found.append("The results above are of single checkpoints, not of their mean.")
    found.append("It has the limits of what it was made from, as far as training did not change them.")
    return found
