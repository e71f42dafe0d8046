"""What a recipe is made into: its documents, views, batch source, objective, model and reference.

One maker for each part; `train.py` puts them together. Another objective changes `make_objective`, another origin of
batches `make_source`. Sources wrap each other, and each adds to the batches of the one inside it (dfactory/columns.py):

    make_source          RecordSource       records, aligned, packed, with views         visit_D
    with_drafts            -> DraftSource     the model's own predictions in the views     at the targets of drafted_N
    make_reference           -> ReferenceSource   the initial model's likelihood           reference_elbo_D
                               -> Trainer.train_window(global batch, objective)

    make_rollout_source  RolloutSource      rollouts, packed, with views                 rollout_D, advantage_D, old_logprob
                           -> Trainer.train_window(global batch, objective)
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from dfactory.algorithms import Data
from dfactory.algorithms.rollouts import rollout_views
from dfactory.data.answers import compiled_pattern
from dfactory.data.chat import SpecialIds
from dfactory.data.examples import DocumentRules, Examples, load_examples
from dfactory.data.source import MakeViews, RecordSource
from dfactory.data.streaming import StreamedExamples
from dfactory.data.traces import TraceRules
from dfactory.engine.drafting import DraftSource
from dfactory.engine.reference import ReferenceSource, Score, adapter_off, elbo_by, frozen_copy
from dfactory.engine.stored import stored_reference
from dfactory.engine.trainer import Trainer, keep_zero3_config
from dfactory.engine.window import Measure, Source, means_by_t
from dfactory.errors import ConfigError
from dfactory.models import fused
from dfactory.models.adapters import add_adapters, unreached_experts
from dfactory.models.families.base import Noise
from dfactory.models.freezing import freeze
from dfactory.models.hub import resolve
from dfactory.models.mask_token import MaskToken, untrained_mask
from dfactory.models.policy import Policy
from dfactory.models.registry import load_policy, read_config, read_family
from dfactory.models.saving import carried_files
from dfactory.noise import (
    Drafts,
    EditTargets,
    GridMask,
    GridUniform,
    MaskEmbeddingNoise,
    RandomMask,
    TokenEmbeddingNoise,
    TraceViews,
    UniformNoise,
)
from dfactory.recipe import Recipe
from dfactory.rl.rows import pads_on
from dfactory.rl.source import RATIO_TOLERANCE, RolloutClient, RolloutSource
from dfactory.runs.probe import DecodingProbe, first_questions
from dfactory.types import Objective
from dfactory.vocabulary import Vocabulary, recipe_vocabulary


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What is read before anything is built: the vocabulary and the documents."""

    vocabulary: Vocabulary
    train: Examples | StreamedExamples | None  # none in reinforcement learning: its controller reads prompts
    held_out: Examples | None

    @property
    def special(self) -> SpecialIds:
        return self.vocabulary.special


def read_inputs(recipe: Recipe, streaming: bool = False) -> Inputs:
    """Tokenizer and records of a recipe, those of training only when they are visited if `streaming`. Raises ConfigError or
    DataError; no weights are touched."""
    check_family(recipe)
    vocabulary = recipe_vocabulary(recipe)
    held_out = _load(recipe, vocabulary, recipe.eval_datasets) if recipe.eval_datasets else None
    if recipe.algorithm.data is Data.PROMPTS:
        return Inputs(vocabulary, None, held_out)
    if streaming:
        return Inputs(vocabulary, stream_examples(recipe, vocabulary), held_out)
    return Inputs(vocabulary, _load(recipe, vocabulary, recipe.datasets, trace_block_size_of(recipe)), held_out)


def check_family(recipe: Recipe) -> None:
    """Raise ConfigError for keys that have no meaning with the model's family."""
    family = read_family(resolve(recipe.model_name_or_path, recipe.model_revision, weights=False))
    records = recipe.algorithm.data is Data.RECORDS
    if family.noise is Noise.UNIFORM and (not records or recipe.views_are_traces):
        given = recipe.algorithm.wide_selector if not records else "view_source trace"
        raise ConfigError(
            f"{given}: the model family {family.name} has uniform noise instead of a mask, so nothing marks the tokens that "
            "a step still has to predict, and answers have no likelihood here; take an algorithm that learns from records"
        )
    if recipe.use_liger_kernel and family.checked:
        raise ConfigError(
            f"use_liger_kernel true: no family declares the model_type {family.name}, and what its norms and gated products "
            "compute beside Liger's kernels is not known; set it to false"
        )
    if recipe.has_canvases != (family.noise is Noise.UNIFORM):
        raise ConfigError(
            f"view_source {recipe.view_source}: the model family {family.name} was trained with "
            f"{family.noise} noise; set view_source to {'uniform' if family.noise is Noise.UNIFORM else 'mask'}"
        )
    family.has_full_attention(recipe.block_size)


def stream_examples(recipe: Recipe, vocabulary: Vocabulary) -> StreamedExamples:
    if recipe.max_steps is None:
        raise ConfigError(
            "streaming: true with num_train_epochs: how many steps that makes is not known before all is read; set max_steps"
        )
    return StreamedExamples(
        recipe.datasets,
        vocabulary.encoder,
        document_rules(recipe, vocabulary, trace_block_size_of(recipe)),
        on_bad_row=recipe.on_bad_row,
        max_bad_fraction=recipe.max_bad_fraction,
        block_size=recipe.aligned_block_size,
        fill_unit=recipe.fill_unit,
        paired=recipe.documents_per_record == 2,
    )


def trace_block_size_of(recipe: Recipe) -> int | None:
    """Of the traces that views are made from, where they are; WHOLE: decoded on a canvas."""
    return recipe.aligned_block_size if recipe.views_are_traces else None


def document_rules(recipe: Recipe, vocabulary: Vocabulary, trace_block_size: int | None) -> DocumentRules:
    """What a record has to be like."""
    return DocumentRules(
        max_length=recipe.max_length,
        overlong=recipe.overlong,
        eos_id=vocabulary.special.eos,
        vocab_size=vocabulary.size,
        mask_id=vocabulary.special.mask,
        traces=TraceRules(trace_block_size, recipe.trace_filter == "correct"),
        weighed=recipe.algorithm.weighs_records,
    )


def _load(recipe: Recipe, vocabulary: Vocabulary, datasets, trace_block_size: int | None = None) -> Examples:
    return load_examples(
        datasets,
        vocabulary.encoder,
        **vars(document_rules(recipe, vocabulary, trace_block_size)),
        on_bad_row=recipe.on_bad_row,
        max_bad_fraction=recipe.max_bad_fraction,
        block_size=recipe.aligned_block_size,
        fill_unit=recipe.fill_unit,
        paired=recipe.documents_per_record == 2,
    )


def make_views(recipe: Recipe, inputs: Inputs) -> MakeViews:
    """The views of training: masks, and with token editing wrong tokens as well; or the states of a decoder."""
    if recipe.views_are_traces:
        return TraceViews(inputs.special.mask, recipe.seed, recipe.trace_stride, recipe.num_views, recipe.stratified)
    if recipe.has_canvases:
        return UniformNoise(inputs.vocabulary.size, recipe.seed, **recipe.uniform_options)
    masks = RandomMask(inputs.special.mask, recipe.seed, **recipe.mask_options)
    if not recipe.edits:
        return masks
    return EditTargets(
        masks,
        mask_id=inputs.special.mask,
        text_ids=inputs.special.text_ids(inputs.vocabulary.size),
        seed=recipe.seed,
        edit_share=recipe.edit_share,
        keep_share=recipe.keep_share,
        source=recipe.edit_source,
        num_turns=recipe.num_turns,
        draft_share=recipe.draft_share,
    )


def make_source(recipe: Recipe, inputs: Inputs, rank: int, world_size: int) -> RecordSource:
    return RecordSource(
        inputs.train,
        [entry.weight for entry in recipe.datasets],
        make_views(recipe, inputs),
        num_views=recipe.views_per_document,
        block_phases=recipe.block_phases,
        add_columns=make_embedding_noise(recipe, inputs.special.mask),
        scores_context=recipe.context_loss_weight > 0,
        row_length=recipe.row_length or recipe.longest_record,
        micro_batch_rows=recipe.per_device_train_batch_size,
        accumulation=recipe.gradient_accumulation_steps,
        window_tokens=recipe.gradient_accumulation_tokens,
        max_epochs=recipe.num_train_epochs if recipe.max_steps is None else None,
        mixing_temperature=recipe.mixing_temperature,
        curriculum=recipe.curriculum,
        **_alike(recipe, inputs, rank, world_size),
    )


def _alike(recipe: Recipe, inputs: Inputs, rank: int, world_size: int) -> dict[str, Any]:
    """What the sources of training and of evaluation have in common."""
    return {
        "block_size": recipe.aligned_block_size,
        "eos_id": inputs.special.eos,
        "packing": recipe.packing,
        "seed": recipe.seed,
        "rank": rank,
        "world_size": world_size,
        "after_answer": recipe.after_answer,
        "fill_unit": recipe.fill_unit,
        "canvas": recipe.block_size if recipe.has_canvases else None,
    }


def make_embedding_noise(recipe: Recipe, mask_id: int) -> MaskEmbeddingNoise | TokenEmbeddingNoise | None:
    if recipe.neftune_noise_alpha:
        config = read_config(resolve(recipe.model_name_or_path, recipe.model_revision, weights=False))
        row_length = recipe.row_length or recipe.longest_record
        return TokenEmbeddingNoise.of(recipe.neftune_noise_alpha, recipe.seed, row_length, config.hidden_size)
    if recipe.mask_embedding_noise == 0:
        return None
    return MaskEmbeddingNoise(mask_id, recipe.seed, recipe.mask_embedding_noise, recipe.mask_embedding_noise_steps)


def make_eval_source(recipe: Recipe, inputs: Inputs, rank: int, world_size: int) -> RecordSource:
    """The held-out documents once, with the same noise at every evaluation: one view at every mask ratio of the grid, or
    for pairs those of training, because what is measured then is the objective itself."""
    levels = tuple(recipe.eval_noise_levels)
    views, num_views = GridMask(inputs.special.mask, recipe.seed, levels), len(levels)
    if recipe.has_canvases:
        views = GridUniform(inputs.vocabulary.size, recipe.seed, levels)
    if make_objective(recipe, inputs).measure is not None:
        views, num_views = make_views(recipe, inputs), recipe.views_per_document
    return RecordSource(
        inputs.held_out,
        [1.0 for _ in recipe.eval_datasets],
        views,
        num_views=num_views,
        row_length=(
            recipe.longest_with(num_views)
            if recipe.has_canvases
            else recipe.documents_per_record * recipe.max_length * (1 + num_views)
        ),
        micro_batch_rows=recipe.per_device_eval_batch_size,
        max_epochs=1,
        **_alike(recipe, inputs, rank, world_size),
    )


def with_drafts(recipe: Recipe, inputs: Inputs, source: Source, trainer: Trainer) -> Source:
    """The source, and with token editing by the model's own predictions the drafts in its batches."""
    drafts = Drafts(recipe.views_per_turn, inputs.special.suppressed, recipe.draft_threshold)
    rewrites = [drafts.replace_masked] if recipe.edit_source == "model" else []
    rewrites += [functools.partial(drafts.next_turn, turn=turn) for turn in range(2, recipe.num_turns + 1)]
    return DraftSource(source, trainer.score, rewrites) if rewrites else source


def make_rollout_source(recipe: Recipe, inputs: Inputs, client: RolloutClient, trainer: Trainer) -> Source:
    """Rollouts as windows. The KL term's reference is the initial model: call this before a checkpoint is loaded."""
    needs = recipe.algorithm.needs(recipe)
    return RolloutSource(
        client,
        trainer.weights,
        trainer.score,
        rollout_views(recipe, make_views(recipe, inputs)),
        reference=initial_score(recipe, trainer),
        block_size=recipe.aligned_block_size,
        row_length=recipe.row_length or recipe.longest_record,
        rank=trainer.rank,
        world_size=trainer.world_size,
        micro_batch_rows=recipe.per_device_train_batch_size,
        num_iterations=recipe.num_iterations,
        traces=recipe.algorithm.is_recorded(recipe),
        old_policy=recipe.old_policy,
        compares=needs.old_logprob,
        knows_ratio_1=needs.takes_ratio_1 and not trainer.policy.has_dropout,
        train_after_eos=recipe.train_after_eos,
        padded=pads_on(trainer.device),
        ratio_tolerance=RATIO_TOLERANCE[recipe.dtype],
    )


def make_objective(recipe: Recipe, inputs: Inputs) -> Objective:
    return recipe.algorithm.objective(recipe, inputs.special.mask if recipe.edits else None)


def make_measure(recipe: Recipe, objective: Objective) -> Measure:
    """What an evaluation reports of each micro-batch."""
    return objective.measure or means_by_t(recipe.eval_noise_levels)


def make_probe(recipe: Recipe, inputs: Inputs) -> DecodingProbe | None:
    """What decodes held-out prompts at every evaluation, if the recipe asks for it."""
    if not recipe.eval_decode_prompts:
        return None
    questions = first_questions(inputs.held_out, recipe.eval_decode_prompts)
    pattern = compiled_pattern(recipe.eval_answer_pattern, "eval_answer_pattern")
    return DecodingProbe(questions, inputs.vocabulary, recipe.decode_keys, pattern)


def make_reference(
    recipe: Recipe, inputs: Inputs, trainer: Trainer, num_windows: int, cursor: dict[str, Any] | None
) -> Callable[[Source], Source]:
    """What puts the scores of the initial model beside a source's batches, where the objective compares with it. To be
    called before a checkpoint is loaded: the trainer's policy is the initial model until then. `cursor` is where a resumed
    run goes on, for so many windows."""
    if recipe.algorithm.data is Data.PROMPTS or not recipe.algorithm.needs(recipe).reference:
        return lambda source: source
    reference = elbo_by(initial_score(recipe, trainer))
    if recipe.reference_kind == "precomputed":
        rank, world_size = trainer.rank, trainer.world_size
        records = make_source(recipe, inputs, rank, world_size)
        if cursor is not None:
            records.load_state_dict(cursor)
        sources = [(records, num_windows)]
        if inputs.held_out is not None:
            held_out = make_eval_source(recipe, inputs, rank, world_size)
            sources.append((held_out, held_out.num_windows))
        reference = stored_reference(recipe, inputs.special, sources, reference, resuming=cursor is not None)
    return lambda source: ReferenceSource(source, reference)


def initial_score(recipe: Recipe, trainer: Trainer) -> Score | None:
    """What the model that a run starts from says, None where the recipe compares with nothing. To be called before a
    checkpoint is loaded."""
    makers = {
        None: lambda: None,
        "copy": lambda: load_frozen(recipe, "reference", trainer.policy.mask),
        "adapter": lambda: adapter_off(trainer),
        "precomputed": lambda: trainer.score,  # as long as no step was made
    }
    return makers[recipe.reference_kind]()


def load_frozen(recipe: Recipe, name: str, mask: MaskToken | None = None) -> Score:
    """The initial model as one of the recipe's `frozen_models`, which the memory forecast counts."""
    if name not in recipe.frozen_models:
        raise ValueError(f"{name} is not among Recipe.frozen_models {recipe.frozen_models}: declare it there")
    return frozen_copy(recipe, load_initial(recipe, mask))


def load_initial(recipe: Recipe, mask: MaskToken | None = None) -> Policy:
    """The model that a run starts from; the adapters of an earlier run are part of its weights. `mask` is the one that it is
    given (`Vocabulary.new_mask`)."""
    zero3 = keep_zero3_config(recipe)  # has to outlive the loading
    policy = load_policy(
        recipe.model_name_or_path,
        revision=recipe.model_revision,
        dtype=recipe.dtype,
        init_weights=recipe.init_weights,
        seed=recipe.seed,
        attn_implementation=recipe.attn_implementation,
        merged=True,
        token_ranges=recipe.token_ranges,
        logit_shift=recipe.logit_shift,
        mask=mask,
    )
    del zero3
    if recipe.use_liger_kernel:
        fused.fuse(policy.model)  # here, so that a frozen reference computes as the policy does
    return policy


def make_policy(recipe: Recipe, mask: MaskToken | None = None) -> Policy:
    """The model to be trained, with the mask that it is given."""
    policy = load_initial(recipe, mask)
    carried_files(policy.source_dir)  # or the first checkpoint would tell that one of them cannot be copied
    policy.entropy_temperature = recipe.algorithm.needs(recipe).entropy_temperature or 1.0
    if recipe.frozen_parameters:
        freeze(policy.model, recipe.frozen_parameters)
    if recipe.use_peft:
        add_adapters(policy, **recipe.lora_options, seed=recipe.seed)
    return policy


def policy_notes(policy: Policy) -> str:
    """What a run has to tell of a model that no family declares: what was checked of it. Empty for the others."""
    return "\n".join(f"self-check: {finding}" for finding in policy.family.checked)


def policy_warnings(recipe: Recipe, policy: Policy, mask_id: int) -> list[str]:
    """What a run has to say of the model that it trains, in its first lines."""
    if recipe.use_peft:
        return unreached_experts(policy.model, recipe.lora_target_modules)
    return untrained_mask(policy.model, mask_id)
