"""The whole recipe: flat, with TRL's and transformers' names; and how it is read.

A YAML file and `key=value` overrides -> a checked Recipe. Every mistake is a ConfigError that names the key.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf

from dfactory.algorithms.base import (
    ALGORITHMS,
    Algorithm,
    Data,
    choices_of,
    default_of,
    refuse_other_selections,
    selected,
)
from dfactory.config.course import course_problems, tracker_problems
from dfactory.config.data import DataKeys, DatasetKeys
from dfactory.config.earlier import Alias, translate
from dfactory.config.editing import EditingKeys
from dfactory.config.keys import key
from dfactory.config.load import COMMAND_LINE, NOT_YAML, known_keys, merge_layers, parse_overrides
from dfactory.config.merge import small_is_good
from dfactory.config.model import ModelKeys
from dfactory.config.noise import NoiseKeys
from dfactory.config.optimising import optimising_problems
from dfactory.config.owners import combine, refuse_foreign
from dfactory.config.training import TrainingKeys
from dfactory.config.words import TEMPLATE_ENDINGS
from dfactory.data.answers import compiled_pattern
from dfactory.decoding.keys import DecodeKeys, decode_problem, refuse_foreign_keys
from dfactory.errors import ConfigError
from dfactory.ranges import TokenRanges
from dfactory.redaction import remember
from dfactory.types import WHOLE

UNSET = object()
PATH_KEYS = ("deepspeed", "chat_template_path", "reference_path")  # paths that a recipe states relative to itself


STAGES, POLICY_LOSSES = choices_of("stage"), choices_of("policy_loss")
AlgorithmKeys = combine("AlgorithmKeys", ALGORITHMS, __name__)


_CORE = [TrainingKeys, EditingKeys, NoiseKeys, DataKeys, ModelKeys]
if _TAKEN := {f.name for f in fields(AlgorithmKeys)} & {f.name for group in _CORE for f in fields(group)}:
    raise ConfigError(f"an algorithm declares {', '.join(_TAKEN)}, which every recipe has: give its key another name")


@dataclass
class SelectingKeys:
    stage: str = key(default_of("stage"), "what is optimised; docs/algorithms.md", choices=tuple(STAGES))
    policy_loss: str = key(
        default_of("policy_loss"),
        "stage rl: what stands for a rollout's likelihood, and what is made of it",
        choices=tuple(POLICY_LOSSES),
    )


@dataclass
class Recipe(TrainingKeys, AlgorithmKeys, SelectingKeys, EditingKeys, NoiseKeys, DataKeys, ModelKeys):
    decode: DecodeKeys = key(DecodeKeys, "how prompts are decoded during training")

    @property
    def edits(self) -> bool:
        """Whether visible tokens are targets too."""
        return self.edit_share > 0 or self.num_turns > 1

    @property
    def views_per_turn(self) -> int:
        return self.num_views * (2 if self.complementary else 1)

    @property
    def views_per_document(self) -> int:
        """K: the views that a document gets in one row."""
        return self.views_per_turn * self.num_turns

    @property
    def block_phases(self) -> list[tuple[int, int]]:
        """(first step, block size) of each phase of the run; one phase without a schedule."""
        return [(first, size) for first, size in self.block_size_schedule or [[0, self.aligned_block_size]]]

    @property
    def aligned_block_size(self) -> int:
        """What documents are aligned to; under canvases a clean token is a block."""
        if self.has_canvases:
            return 1
        return WHOLE if self.block_size is None else self.block_size

    @property
    def fill_unit(self) -> int:
        """Documents are filled with EOS to a multiple of so many tokens."""
        return 1 if self.has_canvases else self.block_size or self.eos_fill or 1

    @property
    def decode_keys(self) -> DecodeKeys:
        """How prompts are decoded, with the block size of training where `decode` states none."""
        return self.decode.in_blocks_of(self.block_size)

    def block_size_at(self, step: int) -> int:
        """The block size of a step, counted from 0."""
        return next(size for first, size in reversed(self.block_phases) if first <= step)

    def warmup_of(self, num_steps: int) -> int:
        """Steps of the warmup in a run of so many."""
        return math.ceil(self.warmup_steps * num_steps) if self.warmup_steps < 1 else round(self.warmup_steps)

    @property
    def smaller_is_better(self) -> bool:
        """Of metric_for_best_model."""
        if self.greater_is_better is not None:
            return not self.greater_is_better
        return small_is_good(self.metric_for_best_model or "")

    @property
    def algorithm(self) -> Algorithm:
        """What `stage`, and in reinforcement learning `policy_loss`, select."""
        return selected(self)

    @property
    def documents_per_record(self) -> int:
        return self.algorithm.data.documents_per_record

    @property
    def reference_kind(self) -> str | None:
        """What gives the scores of the initial model that the objective compares with: a frozen `copy`, the policy with its
        `adapter` off, or `precomputed` ones; None where it compares with nothing."""
        if not self.algorithm.needs(self).reference:
            return None
        return self.reference or ("adapter" if self.use_peft else "copy")

    @property
    def frozen_models(self) -> tuple[str, ...]:
        """The models that a learner holds beside the one in training: assembly loads these and no others, and the memory
        forecast has a line of this name for each."""
        return ("reference",) if self.reference_kind == "copy" else ()

    @property
    def decodes_ahead(self) -> bool:
        """Whether rollouts may be stale: there are new weights every num_iterations versions."""
        return self.max_staleness >= self.num_iterations

    @property
    def actors_score(self) -> bool:
        """Whether rollout actors say how likely the views of their rollouts are. A trace is recorded as it is decoded, but
        at another temperature that is not what the learner's ratio compares."""
        if not self.algorithm.needs(self).old_logprob or self.old_policy != "decoder":
            return False
        return self.decodes_ahead and not (self.algorithm.is_recorded(self) and self.decode.temperature == 1)

    @property
    def longest_record(self) -> int:
        """Row positions that a record of max_length takes at most, its views included."""
        return self.longest_with(self.views_per_document)

    def longest_with(self, num_views: int) -> int:
        """The same with so many views."""
        clean = 0 if self.block_size is None else self.max_length
        view = self.max_length + (self.block_size - 1 if self.has_canvases else 0)  # the last canvas may go beyond it
        return self.documents_per_record * (clean + num_views * view)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A recipe and where it comes from."""

    recipe: Recipe
    origins: dict[str, str]  # dotted key -> file or "the command line"; keys that have their default are not in it
    aliases: list[Alias]  # what became of the keys of the earlier dFactory; none in a recipe of this one


def load_recipe(path: str | Path, overrides: list[str] = ()) -> Recipe:
    """The recipe alone."""
    return read_recipe(path, overrides).recipe


def read_recipe(path: str | Path, overrides: list[str] = (), ranks: int | None = None) -> Loaded:
    """Read, merge, type-check and cross-check. Paths in the file are relative to it (those of the earlier dFactory's keys to
    the caller), overrides to the caller. `ranks`, by default this launch's, is what a global batch size is divided over."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            f"recipe {path} does not exist: give a YAML file such as recipes/quickstart/sft.yaml "
            "(`dfactory recipes --output recipes` writes those that come with dFactory)"
        )
    try:
        file_layer = OmegaConf.load(path)
    except (*NOT_YAML, OSError) as problem:
        raise ConfigError(f"{path} is not valid YAML: {problem}") from problem
    if not isinstance(file_layer, DictConfig):
        raise ConfigError(f"{path} holds no keys: a recipe is a mapping of key: value lines")
    _resolve_paths(file_layer, path.parent)
    layers = [(str(path), file_layer), (COMMAND_LINE, parse_overrides(overrides))]
    layers, aliases = translate(layers, ranks or int(os.environ.get("WORLD_SIZE", "1")))
    recipe = merge_layers(Recipe, layers)
    remember(recipe)
    origins = _origins(layers)
    refuse_other_selections(recipe, origins)
    refuse_foreign(recipe, origins, ALGORITHMS, recipe.algorithm)
    refuse_foreign_keys(recipe.decode, origins, "decode.")
    _check_recipe(recipe, f"{path} and the command line" if overrides else str(path))
    return Loaded(recipe, origins, aliases)


def _origins(layers: list[tuple[str, DictConfig]]) -> dict[str, str]:
    groups = {name: field for name, field in known_keys(Recipe).items() if not dataclasses.is_dataclass(field.type)}
    return {
        name: origin
        for name in groups
        for origin, layer in layers
        if OmegaConf.select(layer, name, default=UNSET) is not UNSET
    }


def _is_template_file(value: str, base: Path) -> bool:
    """Whether `chat_template_path` means a file of templates, not a name."""
    return (base / value).is_file() or value.startswith((".", "/")) or value.endswith(TEMPLATE_ENDINGS)


def _resolve_paths(layer: DictConfig, base: Path) -> None:
    """Make the file's own relative paths absolute; `tiny` names the embedded model, outputs are the caller's."""

    def absolute(value: str) -> str:
        return str((base / value).resolve())

    for name in PATH_KEYS:
        value = layer.get(name)
        if isinstance(value, str) and (name != "chat_template_path" or _is_template_file(value, base)):
            layer[name] = absolute(value)
    model = layer.get("model_name_or_path")
    if isinstance(model, str) and (base / model).is_dir():
        layer["model_name_or_path"] = absolute(model)
    for code in (layer.get("reward_funcs"), layer.get("callbacks")):
        for index, entry in enumerate(code if isinstance(code, ListConfig) else []):  # `file.py:function`
            if isinstance(entry, str) and ".py:" in entry:
                code[index] = absolute(entry)
            elif isinstance(entry, DictConfig) and ".py:" in str(entry.get("name")):
                entry["name"] = absolute(entry["name"])
    for name in ("datasets", "eval_datasets"):
        entries = layer.get(name)
        if isinstance(entries, ListConfig):
            for entry in entries:
                if isinstance(entry, DictConfig) and isinstance(entry.get("path"), str):
                    entry["path"] = absolute(entry["path"])


Rule = Callable[[bool, str], None]  # (what has to hold, the message where it does not)


def _check_recipe(recipe: Recipe, origin: str) -> None:
    """Rules between keys."""

    def rule(holds: bool, message: str) -> None:
        if not holds:
            raise ConfigError(f"{message} in {origin}")

    _check_noise(recipe, rule)
    _check_canvases(recipe, rule)
    _check_block_sizes(recipe, rule)
    _check_fill(recipe, rule)
    _check_embedding_noise(recipe, rule)
    _check_lengths(recipe, rule)
    rule(
        not (recipe.use_peft and recipe.init_weights == "random"),
        "init_weights random with use_peft: the base that the adapters belong to would be lost; train it first",
    )
    for problem in recipe.algorithm.problems(recipe):
        rule(False, problem)
    ranges = TokenRanges.of(recipe.token_ranges, origin)
    rule(
        not (ranges and recipe.edits),
        f"edit_share {recipe.edit_share:g}, num_turns {recipe.num_turns} with token_ranges: wrong tokens are drawn from "
        "text, whatever range a position has; set them to 0 and 1",
    )
    _check_editing(recipe, rule)
    _check_traces(recipe, rule)
    problem = decode_problem(recipe.decode_keys, recipe.decode_keys.block_size)
    rule(problem is None, str(problem))
    _check_run(recipe, rule)


def _check_noise(recipe: Recipe, rule: Rule) -> None:
    """The range of mask ratios, and the block size."""
    low, high = recipe.noise_range_low, recipe.noise_range_high
    rule(low <= high, f"noise_range_low {low:g} > noise_range_high {high:g}: swap them")
    rule(high > 0, "noise_range_high 0 masks nothing: raise it")
    if recipe.mask_count == "exact":
        rule(
            (low, high) == (0, 1),
            f"mask_count exact draws from no mask to all, noise_range_low is {low:g} and noise_range_high {high:g}: "
            "set them to 0 and 1",
        )
    elif weighing := recipe.algorithm.dividing_key(recipe):
        rule(low > 0, f"noise_range_low 0 with {weighing} divides by zero: raise it to 0.001")
        twin_is_finite = not recipe.complementary or high < 1
        rule(
            twin_is_finite,
            f"noise_range_high 1 with complementary views and {weighing} divides by zero: use 0.999",
        )
    rule(
        recipe.block_size is None or recipe.max_length % recipe.aligned_block_size == 0,
        f"block_size {recipe.block_size} does not divide max_length {recipe.max_length}: "
        f"use {recipe.max_length // recipe.aligned_block_size * recipe.aligned_block_size or recipe.block_size}",
    )


def _check_canvases(recipe: Recipe, rule: Rule) -> None:
    """Keys that uniform noise needs, and those that only it has."""
    shown = f"view_source {recipe.view_source}"
    if not recipe.has_canvases:
        for name in ("self_conditioning", "context_loss_weight"):
            value = getattr(recipe, name)
            rule(value == 0, f"{name} {value:g} with {shown}: only uniform noise has it; set it to 0")
        return
    rule(
        recipe.algorithm.data is Data.RECORDS,
        f"{shown} with stage {recipe.stage}: its likelihoods are those of masked tokens, and uniform noise has no mask; "
        f"stages that train on records have a meaning: {_plain_stages()}",
    )
    rule(recipe.block_size is not None, f"{shown} with block_size null: a canvas has a length; set block_size")
    for name in ("mask_token_id", "mask_token"):
        value = getattr(recipe, name)
        rule(value is None, f"{name} {value} with {shown}: there is no mask; set it to null")
    rule(
        not recipe.edits,
        f"edit_share {recipe.edit_share:g}, num_turns {recipe.num_turns} with {shown}: every token of a canvas is a target "
        "there; set edit_share 0 and num_turns 1",
    )
    for name, value, remedy in (
        ("complementary", False, "a view has no twin, because all its tokens are targets"),
        ("mask_count", "bernoulli", "each token is replaced with chance t"),
        ("mask_embedding_noise", 0, "there is no mask"),
        ("loss_weight", "uniform", "all tokens of a canvas are targets and none is weighed by 1/t"),
        ("after_answer", "fill", "a canvas ends in EOS"),
        ("block_size_schedule", None, "a canvas has one length"),
    ):
        found = getattr(recipe, name)
        rule(found == value, f"{name} {str(found).lower()} with {shown}: {remedy}; set {name}={str(value).lower()}")


def _check_fill(recipe: Recipe, rule: Rule) -> None:
    """Fill with EOS where documents are no blocks."""
    if recipe.eos_fill is None:
        return
    shown = f"eos_fill {recipe.eos_fill}"
    rule(
        recipe.block_size is None,
        f"{shown} with block_size {recipe.block_size}: documents are filled to whole blocks anyway; set eos_fill to null",
    )
    rule(
        recipe.max_length % recipe.eos_fill == 0,
        f"{shown} does not divide max_length {recipe.max_length}: use a divisor of it",
    )
    rule(not recipe.views_are_traces, f"{shown} with view_source trace: a trace is as long as its decoder made it")
    rule(
        recipe.algorithm.data is not Data.PROMPTS,
        f"{shown} with stage {recipe.stage}: rollouts are as long as their canvas; set it to null",
    )


def _check_lengths(recipe: Recipe, rule: Rule) -> None:
    """What records and packed sequences can hold."""
    tokens = f"gradient_accumulation_tokens {recipe.gradient_accumulation_tokens}"
    rule(
        recipe.gradient_accumulation_tokens is None or recipe.gradient_accumulation_steps == 1,
        f"{tokens} with gradient_accumulation_steps {recipe.gradient_accumulation_steps}: both say how much a step takes; "
        "leave one of them out",
    )
    rule(
        recipe.gradient_accumulation_tokens is None or recipe.algorithm.data is not Data.PROMPTS,
        f"{tokens} with stage {recipe.stage}: its steps take the rollouts of prompts; set it to null",
    )
    rule(
        recipe.overlong != "split" or recipe.documents_per_record == 1,
        f"overlong split with stage {recipe.stage}: pairs have prompts and cannot be split; use truncate",
    )
    if recipe.row_length is not None:
        rollouts = recipe.algorithm.data is Data.PROMPTS  # they are cut between views
        clean = 0 if recipe.block_size is None else 1
        need = (clean + 1) * recipe.max_length if rollouts else recipe.longest_record
        held = "a rollout of max_length with one view" if rollouts else "a record of max_length with its views"
        rule(
            recipe.row_length >= need,
            f"row_length {recipe.row_length} cannot hold {held}: raise it to {need}",
        )


def _check_run(recipe: Recipe, rule: Rule) -> None:
    """Data, steps, evaluation and reports."""
    rule(bool(recipe.datasets), "datasets is empty: name at least one file")
    _check_datasets(recipe, rule)
    rule(
        recipe.curriculum == "none" or not (recipe.streaming or recipe.algorithm.data is Data.PROMPTS),
        f"curriculum {recipe.curriculum} with {'streaming true' if recipe.streaming else f'stage {recipe.stage}'}: the "
        "lengths of the records are not known before the run; set it to none",
    )
    rule(all(entry.weight > 0 for entry in recipe.datasets), "datasets.weight 0: leave the file out instead")
    rule(
        recipe.max_steps is not None or recipe.num_train_epochs > 0,
        "num_train_epochs 0 and no max_steps: nothing to do",
    )
    rule(recipe.lr_min <= recipe.learning_rate, f"lr_min {recipe.lr_min:g} > learning_rate {recipe.learning_rate:g}")
    rule(all(0 < t <= 1 for t in recipe.eval_noise_levels), "eval_noise_levels must lie in (0, 1]")
    rule(
        recipe.profile_steps is None
        or (len(recipe.profile_steps) == 2 and 1 <= recipe.profile_steps[0] <= recipe.profile_steps[1]),
        f"profile_steps {recipe.profile_steps}: name the first and the last step, such as [10, 12]",
    )
    rule(
        recipe.eval_decode_prompts == 0 or bool(recipe.eval_datasets),
        f"eval_decode_prompts {recipe.eval_decode_prompts} and no eval_datasets to take prompts from: name a file",
    )
    compiled_pattern(recipe.eval_answer_pattern, "eval_answer_pattern")
    rule(
        recipe.activation_memory_gb is None or recipe.gradient_checkpointing,
        f"activation_memory_gb {recipe.activation_memory_gb} needs gradient_checkpointing, by which layers beyond it "
        "recompute their activations: set that to true, or activation_memory_gb to null",
    )
    rule(
        recipe.mask_token is None or recipe.mask_token_id is None,
        f"mask_token {recipe.mask_token} with mask_token_id {recipe.mask_token_id}: both say which token is the mask; set "
        "one of them to null",
    )
    rule(
        recipe.mask_token is None or recipe.mask_token.strip() == recipe.mask_token != "",
        f"mask_token {recipe.mask_token!r} is no text of a token: give it without spaces around it, auto, or null",
    )
    for name, here in (
        ("mask_token_id", "mask_token_id"),
        ("eos_token_id", "eos_token_id"),
        ("full_attention", "block_size"),
    ):
        rule(
            getattr(recipe.decode, name) is None,
            f"decode.{name} belongs to generate and eval: a recipe has one {here} for training and decoding",
        )
    for name in ("torch_compile", "use_peft"):
        rule(
            not (recipe.decode.compile and getattr(recipe, name)),
            f"decode.compile true with {name} true: it takes the layers as they are; leave one of them out",
        )
    for problem in (*tracker_problems(recipe), *course_problems(recipe), *optimising_problems(recipe)):
        rule(False, problem)
    for name in ("save_strategy", "eval_strategy"):
        rule(
            getattr(recipe, name) != "epoch" or recipe.algorithm.data is not Data.PROMPTS,
            f"{name} epoch with stage {recipe.stage}: its steps count prompts, and no epoch ends there; take steps",
        )


def _plain_stages() -> str:
    """Those that train on records as they are."""
    return ", ".join(name for name, algorithm in STAGES.items() if algorithm.data is Data.RECORDS)


def _check_datasets(recipe: Recipe, rule: Rule) -> None:
    """Every entry is a file or a dataset of the hub, and has the keys of that."""
    of_the_hub = ("split", "config", "revision", "data_files")
    untouched = DatasetKeys()
    for group in ("datasets", "eval_datasets"):
        for entry in getattr(recipe, group):
            rule((entry.path is None) != (entry.name is None), f"{group}: give each entry either path or name")
            stray = [key for key in of_the_hub if getattr(entry, key) != getattr(untouched, key)]
            rule(
                entry.path is None or not stray,
                f"{group}.{', '.join(stray)} belong(s) to a dataset of the hub, and {entry.path} is a file: leave it out",
            )
            names = list(entry.rename_columns.values())
            rule(
                len(set(names)) == len(names) and all(names),
                f"{group}.rename_columns {entry.rename_columns}: give every column a name of its own",
            )


def _check_block_sizes(recipe: Recipe, rule: Rule) -> None:
    """The schedule of block sizes."""
    schedule = recipe.block_size_schedule
    if schedule is None:
        return
    shown = f"block_size_schedule {schedule}"
    rule(recipe.block_size is not None, f"{shown} with block_size null: whole documents have no blocks; set it to null")
    rule(
        bool(schedule) and all(len(entry) == 2 for entry in schedule),
        f"{shown}: give pairs of first step and block size, such as [[0, 1], [200, 4], [400, {recipe.block_size}]]",
    )
    steps, sizes = zip(*schedule, strict=True)
    rule(steps[0] == 0, f"{shown}: its first step must be 0")
    rule(all(a < b for a, b in itertools.pairwise(steps)), f"{shown}: its steps must ascend")
    rule(
        sizes[-1] == recipe.block_size,
        f"{shown} ends with {sizes[-1]}, but block_size is {recipe.block_size}: the last one is what the model is for and "
        "what is saved with its weights, so they must be equal",
    )
    for size in sizes:
        rule(size >= 1, f"{shown}: a block has at least 1 token")
        rule(
            size >= recipe.max_length or recipe.max_length % size == 0,
            f"{shown}: {size} does not divide max_length {recipe.max_length}; a block size has to, or be at least as large",
        )
    rule(
        recipe.max_steps is None or steps[-1] < recipe.max_steps,
        f"{shown} begins its last block size at step {steps[-1]}, but max_steps is {recipe.max_steps}: begin it earlier",
    )
    rule(
        recipe.algorithm.data is Data.RECORDS,
        f"{shown} with stage {recipe.stage}: only {_plain_stages()} change their block size; set it to null",
    )
    rule(
        not recipe.views_are_traces,
        f"{shown} with view_source trace: a trace has the block size that it was decoded with; set it to null",
    )


def _check_embedding_noise(recipe: Recipe, rule: Rule) -> None:
    std, steps = recipe.mask_embedding_noise, recipe.mask_embedding_noise_steps
    rule(
        (std > 0) == (steps > 0),
        f"mask_embedding_noise {std:g} with mask_embedding_noise_steps {steps}: give both, or neither",
    )
    _check_neftune(recipe, rule)
    rule(
        std == 0 or recipe.algorithm.data is Data.RECORDS,
        f"mask_embedding_noise with stage {recipe.stage}: only {_plain_stages()} have it; set it to 0",
    )
    rule(
        std == 0 or not recipe.edits,
        f"mask_embedding_noise {std:g} with edit_share {recipe.edit_share:g}, num_turns {recipe.num_turns}: drafts would "
        "take the place of masks that have noise; set it to 0",
    )


def _check_neftune(recipe: Recipe, rule: Rule) -> None:
    if recipe.neftune_noise_alpha is None:
        return
    shown = f"neftune_noise_alpha {recipe.neftune_noise_alpha:g}"
    rule(
        recipe.algorithm.data is Data.RECORDS,
        f"{shown} with stage {recipe.stage}: likelihoods that are compared are those of the model without noise; only "
        f"{_plain_stages()} have it; set it to null",
    )
    rule(
        recipe.mask_embedding_noise == 0,
        f"{shown} with mask_embedding_noise: a token gets one noise; leave one out",
    )
    rule(
        not recipe.edits and not recipe.has_canvases,
        f"{shown} with edit_share {recipe.edit_share:g}, num_turns {recipe.num_turns}, view_source {recipe.view_source}: "
        "the model's own drafts would come from noise; set it to null",
    )


def _check_editing(recipe: Recipe, rule: Rule) -> None:
    """Rules between the keys of token editing."""
    rule(
        recipe.edit_source == "uniform" or recipe.edit_share > 0,
        f"edit_source {recipe.edit_source} with edit_share 0 replaces nothing: raise edit_share",
    )


def _check_traces(recipe: Recipe, rule: Rule) -> None:
    """Rules between the keys of trace views."""
    if not recipe.views_are_traces:
        return
    rule(
        not recipe.complementary,
        "complementary true with view_source trace: a transition has no twin; set complementary=false",
    )
    rule(
        recipe.documents_per_record == 1,
        f"view_source trace with stage {recipe.stage}: a pair has no trace; use view_source=mask",
    )
    rule(
        not recipe.edits,
        f"view_source trace with edit_share {recipe.edit_share:g}, num_turns {recipe.num_turns}: a trace shows what the "
        "decoder saw; set edit_share 0 and num_turns 1",
    )
    rule(
        recipe.block_size_schedule is None,
        "block_size_schedule with view_source trace: a trace has the block size that it was decoded with; set it to null",
    )
