"""The losses of other projects: recipe keys, through views, packing and the objective, give what their trainers computed."""

import numpy as np
import pytest
import torch

from dfactory.algorithms.base import selected
from dfactory.algorithms.loss_weights import LOSS_WEIGHTS, OWN, PUBLISHED_NOISE
from dfactory.errors import ConfigError
from dfactory.noise import RandomMask, masked_view, view_positions
from dfactory.packing import PackedDocument, collate
from dfactory.recipe import Recipe, load_recipe
from dfactory.types import AlignedDocument, ViewBatch
from tests.commands.conftest import ROOT
from tests.families.cases import FAMILIES_WITH_GOLDENS, golden, policy_of
from tests.families.steps import Step, masked, published_steps, response

OF_A_PROJECT = ["noise_range_low=0.001", "noise_range_high=1.0", "noise_level=document", "complementary=false"]
KEYS = {  # (kind of family, loss of expected.json) -> recipe keys
    ("llada", "sft"): ["loss_weight=llada_sft"],
    ("llada", "pretraining"): ["loss_weight=llada_pretraining"],
    ("llada", "dllm"): ["loss_weight=dllm_token"],
    ("llada", "mean"): ["loss_weight=uniform"],
    ("dream", "cart"): ["loss_weight=dream_cart"],
    ("dream", "original"): ["loss_weight=dream_original"],
    ("dream", "linear"): ["loss_weight=dream_linear"],
    ("dream", "none"): ["loss_weight=uniform"],
    ("dream", "dllm"): ["loss_weight=dllm_cart", "cart_p=0.3"],
    ("sdar", "sft"): ["loss_weight=elbo"],
    ("sdar", "mean"): ["loss_weight=uniform"],
    ("fast", "complementary"): ["loss_weight=uniform", "complementary=true", "noise_level=block"],
    ("a2d", "mdlm"): ["loss_weight=dllm_token"],
    ("a2d", "bd3lm"): ["loss_weight=dllm_token"],
}
STEPS = [
    pytest.param(name, step, id=f"{name}-{step.name}")
    for name in FAMILIES_WITH_GOLDENS
    for step in published_steps(golden(name))
]
PACKINGS = pytest.mark.parametrize("rows", [((0,), (1,)), ((0, 1),)], ids=["two rows", "one packed row"])


def recipe_with(*keys: str, block_size: int | None = None) -> Recipe:
    """Of full attention, or in blocks."""
    size = "null" if block_size is None else block_size
    return load_recipe(ROOT / "recipes/dream/sft.yaml", [*OF_A_PROJECT, f"block_size={size}", *keys])


def recipe_of(family: str, step: Step) -> Recipe:
    return recipe_with(*KEYS[golden(family).expected["family"].split("_")[0], step.name], block_size=step.block_size)


def batch_of(family: str, step: Step, rows) -> ViewBatch:
    """The masks of the golden step as views of the house, with the t that the original drew."""
    given = golden(family)
    t_D = given.p_mask if hasattr(given, "p_mask") else getattr(given, "t", torch.ones(len(given.input_ids)))
    packed = []
    for d, ids in enumerate(given.input_ids.numpy().astype(np.int32)):
        document = AlignedDocument(d, ids, response(given)[d].numpy(), step.block_size or len(ids))
        position = view_positions(document)
        t_P = np.full(len(position), float(t_D.reshape(-1)[d]) if t_D.numel() == len(given.input_ids) else 1.0)
        masks = [masked(given, view.noisy_DL)[d].numpy()[position] for view in step.views]
        views = [masked_view(document, position, mask, t_P, given.expected["mask_token_id"]) for mask in masks]
        packed.append(PackedDocument(document, views))
    return collate([[packed[d] for d in row] for row in rows], step.block_size or 1)


@PACKINGS
@pytest.mark.parametrize("family, step", STEPS)
def test_recipe_keys_of_every_published_loss(family, step, rows):
    recipe, batch = recipe_of(family, step), batch_of(family, step, rows)
    with torch.no_grad():
        nll = selected(recipe).objective(recipe, None)(batch, policy_of(family)(batch)).loss["nll"]
    assert float(nll.total) / float(nll.count) == pytest.approx(step.loss, rel=1e-5)


def test_every_published_weight_is_compared():
    """dllm's other two norms, which have no golden number, are in tests/algorithms/test_loss_weights.py."""
    compared = {
        key.removeprefix("loss_weight=") for keys in KEYS.values() for key in keys if key.startswith("loss_weight")
    }
    assert set(LOSS_WEIGHTS) - compared == {"dllm_sequence", "dllm_batch"}


def test_the_noise_of_other_projects():
    """t = 0.999 u + 0.001, once a document, in a single view."""
    recipe = recipe_with("loss_weight=llada_sft")
    assert {name: getattr(recipe, name) for name in PUBLISHED_NOISE} == PUBLISHED_NOISE
    document = AlignedDocument(0, np.arange(64, dtype=np.int32), np.arange(64) >= 8, 64)
    masker = RandomMask(99, 0, **recipe.mask_options)
    views = [masker(document, visit) for visit in range(200)]
    t = np.array([view.t_P[0] for (view,) in views])
    assert all((view.t_P == view.t_P[0]).all() for (view,) in views)
    assert 0.001 <= t.min() < 0.05 < 0.95 < t.max() <= 1
    assert list(selected(recipe).warnings(recipe)) == []


@pytest.mark.parametrize("name", [name for name in LOSS_WEIGHTS if name not in OWN])
def test_other_noise_than_the_source_draws_is_worth_a_warning(name):
    recipe = recipe_with(f"loss_weight={name}", "noise_level=block", "noise_range_low=0.3")
    (warning,) = selected(recipe).warnings(recipe)
    assert warning == (
        f"loss_weight {name} goes with other noise in its source: set noise_range_low=0.001 noise_level=document"
    )


@pytest.mark.parametrize(
    "keys, message",
    [
        (
            ["loss_weight=dream_cart", "block_size=8"],
            "loss_weight dream_cart with block_size 8: it looks at all tokens",
        ),
        (["loss_weight=llada_sft", "cart_p=0.3"], "cart_p 0.3 with loss_weight llada_sft, whose weights have no such"),
        (["loss_weight=llada_sft", "noise_range_low=0"], "loss_weight llada_sft"),
        (["loss_weight=dllm_token", "block_size=8", "edit_share=0.1"], "loss_weight dllm_token with edit_share 0.1"),
        (["loss_weight=llada_sft", "view_source=trace"], "loss_weight llada_sft with view_source trace"),
        (["loss_weight=llada"], "loss_weight llada .*llada_sft"),
    ],
)
def test_weights_that_make_no_sense_there(keys, message):
    with pytest.raises(ConfigError, match=message):
        recipe_with(*keys)
