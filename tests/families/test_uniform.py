"""What holds for every model, whatever its family: one test each over the whole table (tests/families/models.py)."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from dfactory.algorithms.elbo import elbo
from dfactory.algorithms.trace import all_steps
from dfactory.assembly import Inputs, make_objective, make_source, make_views, read_inputs
from dfactory.decoding import DecodeKeys, DecodeRules, decode
from dfactory.models.families.base import Noise
from dfactory.noise import state_before
from dfactory.packing import PackedDocument, align, align_canvases, collate, share
from dfactory.planning.memory import count_parameters
from dfactory.recipe import Recipe
from dfactory.rl.rollouts import ScoredRollout
from dfactory.rl.rows import RolloutRows
from dfactory.rl.source import recorded
from dfactory.types import Example, Rollout, TokenScores, ViewBatch
from tests.engine.conftest import read_metrics
from tests.engine.test_equality import ZERO, scheduled_rates
from tests.families.models import MODELS, Model, families_without_a_model, pairs
from tests.reference import PlainModel, batch_scores, dpo_loss, plain_model, reference_losses, sft_loss

MASKED_MODELS = [model for model in MODELS if model.family.noise is Noise.MASK]
ALL = pytest.mark.parametrize("model", MODELS, ids=str)
MASKED = pytest.mark.parametrize("model", MASKED_MODELS, ids=str)
CANVASES = pytest.mark.parametrize("model", [m for m in MODELS if m not in MASKED_MODELS], ids=str)
SHARING = pytest.mark.parametrize("model", [m for m in MASKED_MODELS if m.block_size is not None], ids=str)
CLOSE = {"atol": 1e-4, "rtol": 0}  # what float32 leaves of log-probabilities down to -20


def test_every_family_has_a_model():
    assert not families_without_a_model()


@ALL
def test_the_forecast_counts_the_parameters(model):
    assert count_parameters(model.directory).total == sum(p.numel() for p in model.policy.parameters())


# --- packing ----------------------------------------------------------------------------------------------------------


def packer(recipe: Recipe, inputs: Inputs) -> Callable[[Example], PackedDocument]:
    """Aligns an example and makes its views."""
    views = make_views(recipe, inputs)

    def packed(example) -> PackedDocument:
        if recipe.has_canvases:
            document = align_canvases(example, recipe.block_size, inputs.special.eos)
        else:
            document = align(example, recipe.aligned_block_size, inputs.special.eos)
        return PackedDocument(document, views(document, 0), scores_context=recipe.context_loss_weight > 0)

    return packed


def packed_units(recipe: Recipe, count: int) -> list[list[PackedDocument]]:
    """The first records with their views: a document, or the two sides of a pair."""
    inputs = read_inputs(recipe)
    packed = packer(recipe, inputs)
    return [[packed(example) for example in inputs.train.unit(index)] for index in range(count)]


def in_one_row(model: Model, units: Iterable[list[PackedDocument]]) -> ViewBatch:
    return collate([[document for unit in units for document in unit]], model.block_size or 1)


def scores_of(model: Model, rows: list[list[PackedDocument]]) -> torch.Tensor:
    with torch.no_grad():
        return model.policy(collate(rows, model.block_size or 1)).logprob_N


@ALL
def test_packed_documents_stand_alone(model, tmp_path):
    """In one packed sequence, in sequences of one batch, and each by itself."""
    documents = [document for (document,) in packed_units(model.recipe(tmp_path), 5)]
    alone = torch.cat([scores_of(model, [[document]]) for document in documents])
    torch.testing.assert_close(scores_of(model, [documents]), alone, **CLOSE)
    torch.testing.assert_close(scores_of(model, [documents[:2], [], documents[2:]]), alone, **CLOSE)


def dpo_recipe(model: Model, folder, *overrides: str) -> Recipe:
    return model.recipe(folder, "stage=dpo", f"datasets=[{{path: {pairs(folder)}}}]", "max_length=24", *overrides)


@SHARING
def test_a_shared_prefix_changes_nothing(model, tmp_path):
    units = packed_units(dpo_recipe(model, tmp_path), 6)
    together = [share(unit) for unit in units]
    assert any(unit[-1].shared for unit in together)
    apart = scores_of(model, [[document for unit in units for document in unit]])
    torch.testing.assert_close(scores_of(model, [[document for unit in together for document in unit]]), apart, **CLOSE)


@CANVASES
def test_a_shared_prefix_of_canvases_changes_nothing(model, tmp_path):
    """Two answers to each prompt. Training under uniform noise takes no pairs, so they are packed by hand."""
    recipe = model.recipe(tmp_path, "context_loss_weight=0")
    packed, units = packer(recipe, read_inputs(recipe)), []
    for number, line in enumerate(pairs(tmp_path).read_text().splitlines()[:6]):
        prompt, *answers = json.loads(line).values()
        trainable = (np.arange(len(prompt + answer)) >= len(prompt) for answer in answers)
        ids = (np.array(prompt + answer, np.int32) for answer in answers)
        units.append([packed(Example(number, *one)) for one in zip(ids, trainable, strict=True)])
    apart = scores_of(model, [[document for unit in units for document in unit]])
    batch = in_one_row(model, map(share, units))
    assert (batch.document_RS >= len(batch.document_id_D)).any()
    with torch.no_grad():
        torch.testing.assert_close(model.policy(batch).logprob_N, apart, **CLOSE)
        torch.testing.assert_close(batch_scores(plain_model(model.directory), batch).logprob, apart, **CLOSE)


# --- one step against plain autograd -----------------------------------------------------------------------------------


def gradients(loss: torch.Tensor, parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    names = [name for name, parameter in parameters.items() if parameter.requires_grad]
    found = torch.autograd.grad(loss, [parameters[name] for name in names], allow_unused=True)
    return {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}


def assert_same_step(found: torch.Tensor, expected: torch.Tensor, model: Model, plain: PlainModel) -> None:
    """Loss and gradients."""
    assert found.item() == pytest.approx(expected.item(), abs=1e-5, rel=1e-5)
    mine, theirs = (
        gradients(found, dict(model.policy.model.named_parameters())),
        gradients(expected, plain.parameters()),
    )
    assert mine.keys() == theirs.keys()
    largest = max(gradient.norm().item() for gradient in theirs.values())
    assert largest > 1e-4
    for name, gradient in theirs.items():
        assert (mine[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-5 * largest, name


def loss_of(objective, batch: ViewBatch, scores: TokenScores) -> torch.Tensor:
    terms = objective(batch, scores)
    parts = [terms.weights.get(name, 1.0) * mean.total / max(float(mean.count), 1) for name, mean in terms.loss.items()]
    return sum(parts)


@ALL
@pytest.mark.parametrize("stage", ["sft", "cap"])
def test_a_step_on_records(model, stage, tmp_path):
    """With uniform noise no target is weighed by 1/t, and one of these documents is self-conditioned."""
    weight = "elbo" if stage == "sft" and model in MASKED_MODELS else "uniform"
    keys = ["stage=cap", "confidence_beta=0.5", "entropy_temperature=0.5"] if stage == "cap" else []
    recipe = model.recipe(tmp_path, f"loss_weight={weight}", *keys)
    batch = in_one_row(model, packed_units(recipe, 5)[2:])
    assert (model in MASKED_MODELS) or batch.columns["conditioned_N"].unique().numel() == 2
    plain, policy = plain_model(model.directory), model.policy
    policy.entropy_temperature = temperature = 0.5 if stage == "cap" else 1.0
    found = loss_of(make_objective(recipe, read_inputs(recipe)), batch, policy(batch))
    policy.entropy_temperature = 1.0
    scored = [(batch, batch_scores(plain, batch, temperature))]
    expected = sft_loss(scored, weight, 0.5 if stage == "cap" else 0.0, recipe.context_loss_weight)
    assert_same_step(found, expected, model, plain)


@MASKED
def test_a_step_on_pairs(model, tmp_path):
    """The reference is another model than the policy, so that the margin is not 0."""
    recipe = dpo_recipe(model, tmp_path, "beta=0.3", "sft_loss_coef=0.1", "noise_level=document")
    batch = in_one_row(model, map(share, packed_units(recipe, 2)))
    plain, start = plain_model(model.directory), plain_model(model.directory)
    with torch.no_grad():
        for parameter in start.parameters().values():
            parameter.mul_(0.95)
        reference_D = elbo(batch, batch_scores(start, batch).logprob)
    batch = batch.with_columns(reference_elbo_D=reference_D)
    found = loss_of(make_objective(recipe, read_inputs(recipe)), batch, model.policy(batch))
    assert_same_step(found, dpo_loss([(batch, batch_scores(plain, batch))], start, 0.3, 0.1), model, plain)


# --- rollouts ---------------------------------------------------------------------------------------------------------


def rollouts_of(model: Model, prompts: list[list[int]], **keys) -> list[Rollout]:
    keys = {"min_commit": 2, "max_new_tokens": 8, "temperature": 1.0, "acceptance": "top"} | keys
    keys = DecodeKeys(**{"block_size": model.block_size or 4, "suppress_special": False} | keys | model.special)
    found = decode(model.policy, prompts, DecodeRules.of(keys, canvas=model.block_size is None))
    return [rollout for rollout in found if keys.mask_token_id not in rollout.token_ids]


def rows_of(model: Model, row_length: int = 300) -> RolloutRows:
    mask, recipe = model.special["mask_token_id"], Recipe(block_size=model.block_size, output_dir="")
    return RolloutRows(all_steps(mask), recipe.aligned_block_size, row_length)


@MASKED
def test_the_decoder_records_what_the_learner_computes(model):
    """So that the ratio is 1 at the first step: every target of every step, in packed sequences with a shared prompt."""
    rollouts = rollouts_of(model, [list(range(5, 5 + length)) for length in (1, 4, 7, 4, 4)])
    scored = [ScoredRollout(len(one.prompt_ids), n, one, 1.0, 1.0) for n, one in enumerate(rollouts)]
    assert sum(one.forwards < len(one.token_ids) for one in rollouts) > 1
    count = 0
    for batch in rows_of(model).build(scored):
        with torch.no_grad():
            torch.testing.assert_close(model.policy.score(batch).logprob_N, recorded(batch, scored), **CLOSE)
        count += batch.num_targets
    assert count == sum(len(one.token_ids) for one in rollouts)


def states_by_hand(rollout: Rollout, model: Model, mask: int) -> list[tuple[list[int], list[int]]]:
    """(tokens of the document as a forward saw them, positions that it committed), for each forward that committed some."""
    found, prompt = [], len(rollout.prompt_ids)
    for step in sorted(set(rollout.commit_step)):
        seen = [*rollout.prompt_ids, *state_before(rollout, step, mask).tolist()]
        if model.block_size is None:
            seen += [mask] * (prompt + len(rollout.token_ids) + len(rollout.masks_left) - len(seen))
        found.append((seen, [prompt + index for index, when in enumerate(rollout.commit_step) if when == step]))
    return found


def plain_logprobs(plain: PlainModel, rollout: Rollout, model: Model, mask: int) -> torch.Tensor:
    """log p of each response token at the forward that wrote it: every forward by itself, with a mask of its own."""
    ids, found = [*rollout.prompt_ids, *rollout.token_ids], []
    for seen, committed in states_by_hand(rollout, model, mask):
        position = torch.arange(len(seen))
        block = position // (model.block_size or len(seen))
        mask_SS = torch.where(block[:, None] >= block[None, :], 0.0, torch.finfo(torch.float32).min)
        logprob_SV = plain(torch.tensor([seen]), position[None], mask_SS[None, None])[0].log_softmax(-1)
        found += [logprob_SV[max(i - plain.logit_shift, 0), ids[i]] for i in committed]
    return torch.stack(found)


@MASKED
def test_a_step_on_rollouts(model):
    """Three answers of three tokens to one prompt: token ratios on the decoder's steps, averaged over each answer."""
    mask = model.special["mask_token_id"]
    prompt = list(range(5, 10)) if model.block_size else list(range(5, 11))
    rollouts = rollouts_of(model, [prompt] * 3, max_new_tokens=3, **({} if model.block_size else {"block_size": 3}))
    advantages = [1.0, -0.5, -0.75]
    scored = [ScoredRollout(1, n, one, 0.0, advantages[n]) for n, one in enumerate(rollouts)]
    recipe = Recipe(stage="rl", policy_loss="trace", block_size=model.block_size, output_dir="")
    (batch,) = rows_of(model).build(scored)
    with torch.no_grad():
        batch = batch.with_columns(old_logprob_N=model.policy(batch).logprob_N)
    found = loss_of(recipe.algorithm.objective(recipe, None), batch, model.policy(batch))
    plain, expected = plain_model(model.directory), torch.zeros(())
    for one, advantage in zip(rollouts, advantages, strict=True):
        logprob_T = plain_logprobs(plain, one, model, mask)
        ratio_T = (logprob_T - logprob_T.detach()).exp()
        expected = expected - advantage * ratio_T.sum() / len(one.output_ids) / len(rollouts)
    assert_same_step(found, expected, model, plain)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, run_jobs) -> Path:
    """20 steps of each model on two ranks, with ZeRO 0 and 3, and the first of these again from its 18th step on. One launch
    does all of them."""
    folder, jobs = tmp_path_factory.mktemp("trained"), []
    for model in MODELS:
        file = model.recipe_file(folder)
        split = ["per_device_train_batch_size=1", "save_steps=18"]
        again = [f"resume_from_checkpoint={folder}/{model}-0/checkpoint-18", f"output_dir={folder}/{model}-again"]
        jobs += [(file, [*split, ZERO[stage], f"output_dir={folder}/{model}-{stage}"]) for stage in (0, 3)]
        jobs.append((file, [*split, ZERO[0], *again]))
    run_jobs(2, jobs)
    return folder


@pytest.mark.slow
@ALL
def test_losses_of_twenty_steps_equal_plain_torch(model, trained):
    """With ZeRO 0 and 3, on two ranks."""
    recipe = model.recipe(trained)
    source = make_source(recipe, read_inputs(recipe), rank=0, world_size=1)
    windows = [source.next_window() for _ in range(recipe.max_steps)]
    options = {"weight_decay": recipe.weight_decay, "context_loss_weight": recipe.context_loss_weight}
    plain, rates = plain_model(model.directory), scheduled_rates(recipe)
    expected = torch.tensor(reference_losses(model.directory, windows, rates, **options, model=plain))
    for stage in (0, 3):
        found = torch.tensor(read_metrics(trained / f"{model}-{stage}"))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@ALL
def test_a_resumed_run_ends_bitwise_alike(model, trained):
    whole, resumed = (trained / f"{model}-{run}" / "checkpoint-20/model.safetensors" for run in ("0", "again"))
    assert whole.read_bytes() == resumed.read_bytes()
