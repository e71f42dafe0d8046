"""Families beside LLaDA2: what the original code computed from their golden files is what a Policy computes.

DFACTORY_GOLDEN_DIR names another folder of such files than tests/golden/families.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dfactory.algorithms.sft import SFT
from dfactory.decoding import DecodeKeys, DecodeRules, decode
from dfactory.models.attention import plan_attention
from dfactory.models.registry import load_policy
from dfactory.models.saving import save_policy
from dfactory.packing import PackedDocument, collate
from dfactory.types import PADDING, AlignedDocument, Place, View, ViewBatch
from tests.models.conftest import GOLDEN_DIR

FOLDER = Path(os.environ.get("DFACTORY_GOLDEN_DIR", GOLDEN_DIR / "families"))


@pytest.fixture(scope="module")
def dream():
    directory = FOLDER / "dream"
    return SimpleNamespace(
        directory=directory,
        policy=load_policy(directory, dtype="float32"),
        expected=json.loads((directory / "expected.json").read_text()),
        **{name.replace(".", "_"): tensor for name, tensor in load_file(directory / "forward.safetensors").items()},
    )


def full_places(real_RS: torch.Tensor) -> Place:
    """A document a row; padding belongs to none."""
    document_RS = torch.arange(len(real_RS))[:, None].expand(real_RS.shape).masked_fill(~real_RS, PADDING)
    nought_RS = torch.zeros_like(document_RS)
    return Place(document_RS, nought_RS, nought_RS, document_RS)


@pytest.mark.parametrize("implementation", ["dense", "segments"])
@pytest.mark.parametrize("case", ["input_ids logits", "noisy_ids noisy_logits", "padded_input_ids padded_logits"])
def test_logits_of_full_attention(dream, case, implementation):
    """Of all rows, those of pads included: a pad is neither a key nor a query, and positions are counted without pads."""
    ids, expected = (getattr(dream, name) for name in case.split())
    padded = case.startswith("padded")
    real_RS = dream.padded_attention_mask_2d.bool() if padded else torch.ones_like(ids, dtype=torch.bool)
    position_RS = dream.padded_position_ids if padded else dream.position_ids
    plan = plan_attention(full_places(real_RS), implementation)
    with torch.no_grad():
        logits = dream.policy.logits(dream.policy.hidden(ids, position_RS.expand(ids.shape), plan))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def golden_batch(dream, rows, weight_RS: torch.Tensor) -> ViewBatch:
    """The golden step by way of views and packing; `rows` name the documents of each row."""
    packed = []
    for d in range(len(dream.input_ids)):
        ids_T, noisy_T = dream.input_ids[d].numpy().astype(np.int32), dream.noisy_ids[d].numpy().astype(np.int32)
        trainable_T = (dream.labels[d] != -100).numpy()
        masked_T = trainable_T & (noisy_T == dream.expected["mask_token_id"])
        t_T = np.full(len(ids_T), float(dream.t[d]), np.float32)
        view = View(np.arange(len(ids_T), dtype=np.int32), noisy_T, masked_T, t_T, weight_RS[d].numpy())
        packed.append(PackedDocument(AlignedDocument(d, ids_T, trainable_T, len(ids_T)), [view]))
    return collate([[packed[d] for d in row] for row in rows], 1)


PACKINGS = pytest.mark.parametrize("rows", [((0,), (1,)), ((0, 1),)], ids=["two rows", "one packed row"])


@PACKINGS
def test_scores_are_shifted_and_packed_documents_stand_alone(dream, rows):
    batch = golden_batch(dream, rows, torch.ones_like(dream.input_ids, dtype=torch.float32))
    assert batch.num_tokens == dream.input_ids.numel()  # no clean stream
    with torch.no_grad():
        scores = dream.policy(batch)
    masked = (dream.noisy_ids == dream.expected["mask_token_id"]) & (dream.labels != -100)
    torch.testing.assert_close(-scores.logprob_N, dream.token_nll[masked], atol=5e-5, rtol=0)


def weights_of(dream, name: str) -> torch.Tensor:
    if name == "cart":
        return dream.cart_weights
    t_RS = dream.t[:, None].expand(dream.input_ids.shape)
    return {"original": 1 / t_RS, "linear": 1 - t_RS, "none": torch.ones_like(t_RS)}[name]


@PACKINGS
@pytest.mark.parametrize("weighing", ["original", "linear", "cart", "none"])
def test_published_losses(dream, weighing, rows):
    """Weighted sums over the masked tokens, divided by their number."""
    batch = golden_batch(dream, rows, weights_of(dream, weighing))
    with torch.no_grad():
        total = SFT("elbo")(batch, dream.policy(batch)).loss["nll"].total
    assert float(total) / batch.num_targets == pytest.approx(dream.expected["losses"][weighing], abs=1e-5)


@PACKINGS
@pytest.mark.parametrize("weighing", ["cart", "original"])
def test_every_gradient_norm(dream, weighing, rows):
    """EOS is the padding token, so that its embedding gets no gradient as an input."""
    expected = dream.expected if weighing == "cart" else dream.expected[weighing]
    batch = golden_batch(dream, rows, weights_of(dream, weighing))
    dream.policy.zero_grad()
    (SFT("elbo")(batch, dream.policy(batch)).loss["nll"].total / batch.num_targets).backward()
    norms = {name: parameter.grad.norm().item() for name, parameter in dream.policy.model.named_parameters()}
    assert norms == pytest.approx(expected["grad_norms"], rel=1e-3)
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    assert total == pytest.approx(expected["grad_norm_total"], rel=1e-5)


def test_what_is_saved_is_what_was_read(dream, tmp_path):
    save_policy(dream.policy, tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (dream.directory, tmp_path))
    torch.testing.assert_close(after, before, atol=0, rtol=0)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == json.loads((dream.directory / "config.json").read_text())
    torch.testing.assert_close(dict(load_policy(tmp_path).named_parameters()), dict(dream.policy.named_parameters()))


ORDERS = {"maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy", "origin": "confidence"}


def timed_rules(dream, case: dict, **keys) -> DecodeRules:
    keys = {
        "rule": "timed",
        "time_order": ORDERS[case["alg"]],
        "time_steps": case["steps"],
        "time_end": case["eps"],
    } | keys
    return DecodeRules.of(
        DecodeKeys(max_new_tokens=case["max_new_tokens"], suppress_special=False, **keys).in_blocks_of(None),
        mask_token_id=dream.expected["mask_token_id"],
        eos_token_id=dream.expected["eos_token_id"],
        canvas=True,
    )


def deterministic_cases(expected: dict) -> list[dict]:
    return [case for case in expected["generations"] if case["name"] not in ("origin_seeded", "left_padded_batch")]


def test_generations_token_for_token(dream):
    """Of its own sampler, with the schedule of times as the decoding rule: the same tokens, at the same forwards."""
    cases = deterministic_cases(dream.expected)
    assert {case["alg"] for case in cases} == set(ORDERS)
    for case in cases:
        (rollout,) = decode(dream.policy, [case["prompt"]], timed_rules(dream, case))
        found = rollout.token_ids, rollout.forwards, rollout.commit_step
        assert found == (case["output"], case["forwards"], case["commit_step"]), case["name"]


def test_prompts_of_unequal_length_stand_alone(dream):
    """A batch of the original is padded on the left and shares its step counts; here each prompt is decoded as if alone."""
    (case,) = [case for case in dream.expected["generations"] if case["name"] == "left_padded_batch"]
    rollouts = decode(dream.policy, case["prompt"], timed_rules(dream, case))
    assert [rollout.token_ids for rollout in rollouts] == case["output"]
