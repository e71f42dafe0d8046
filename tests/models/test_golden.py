"""What the original modeling code computed from tests/golden is what a Policy computes: logits, loss, every gradient."""

import pytest
import torch
from transformers.core_model_loading import revert_weight_conversion

from dfactory.models.attention import plan_attention
from dfactory.models.experts import EXPERTS
from dfactory.models.registry import load_policy
from dfactory.types import Place
from tests.batches import Document, make_batch
from tests.reference import block_causal_mask, one_view_nll, reference_model

LENGTH = 48


def clean_place(rows: int, block_size: int) -> Place:
    block = (torch.arange(LENGTH) // block_size).expand(rows, -1)
    document = torch.arange(rows)[:, None].expand(-1, LENGTH)
    return Place(document, torch.zeros_like(block), block, document)


def golden_batch(golden, pairs=((0,), (1,))):
    """The golden noisy ++ clean step as a ViewBatch: the given documents in each row, whole views."""
    documents = [
        Document(golden.input_ids[d], [(golden.noisy_ids[d], golden.labels[d] != -100)], golden.expected["block_size"])
        for d in range(2)
    ]
    return make_batch([[documents[d] for d in row] for row in pairs])


def original_gradient_norms(policy) -> dict[str, float]:
    """Norms under the original names: merged and split parameters are taken apart as in saving."""
    gradients = {name: parameter.grad for name, parameter in policy.model.named_parameters()}
    return {name: g.norm().item() for name, g in revert_weight_conversion(policy.model, gradients).items()}


@pytest.mark.parametrize("implementation", ["dense", "segments"])
def test_block_causal_logits(golden, implementation):
    policy = load_policy(golden.directory, dtype="float32")
    plan = plan_attention(clean_place(2, golden.expected["block_size"]), implementation)
    with torch.no_grad():
        hidden = policy.hidden(golden.input_ids, torch.arange(LENGTH).expand(2, -1), plan)
        logits = policy.logits(hidden)
    torch.testing.assert_close(logits, golden.block_causal_logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("experts", [EXPERTS, "grouped_mm", "eager"])
@pytest.mark.parametrize("pairs", [((0,), (1,)), ((0, 1),)], ids=["two rows", "one packed row"])
def test_loss_and_every_gradient_norm_of_one_step(golden, experts, pairs):
    policy = load_policy(golden.directory, dtype="float32")
    policy.model.set_experts_implementation(experts)
    batch = golden_batch(golden, pairs)
    scores = policy(batch)
    loss = -scores.logprob_N.mean()
    loss.backward()

    assert loss.item() == pytest.approx(golden.expected["loss"], abs=1e-5)
    token_nll = golden.token_nll[golden.labels != -100]  # documents in order, positions in order: the target order
    torch.testing.assert_close(-scores.logprob_N.detach(), token_nll, atol=5e-5, rtol=0)
    norms = original_gradient_norms(policy)
    assert norms.keys() == golden.expected["grad_norms"].keys()
    assert norms == pytest.approx(golden.expected["grad_norms"], rel=1e-3, abs=1e-9)
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    assert total == pytest.approx(golden.expected["grad_norm_total"], rel=1e-5)


def test_views_may_leave_out_the_prompt_blocks(golden):
    """Blocks without response tokens need no view: dropping them moves no score."""
    policy = load_policy(golden.directory, dtype="float32")
    whole = golden_batch(golden)
    block_size = golden.expected["block_size"]
    short = make_batch(
        [
            [
                Document(
                    golden.input_ids[d],
                    [(golden.noisy_ids[d], golden.labels[d] != -100)],
                    block_size,
                    first_block=golden.expected["prompt_lengths"][d] // block_size,
                )
            ]
            for d in range(2)
        ]
    )
    assert short.num_tokens == whole.num_tokens - 8 - 16  # prompts of 10 and 19 tokens: one and two whole blocks
    with torch.no_grad():
        torch.testing.assert_close(policy(short).logprob_N, policy(whole).logprob_N, atol=1e-5, rtol=0)


def test_gradient_checkpointing_changes_nothing(golden):
    def gradients(checkpointing):
        policy = load_policy(golden.directory, dtype="float32").train()
        if checkpointing:
            policy.model.gradient_checkpointing_enable()
        policy(golden_batch(golden)).logprob_N.sum().backward()
        return {name: parameter.grad for name, parameter in policy.named_parameters()}

    torch.testing.assert_close(gradients(True), gradients(False), atol=1e-6, rtol=1e-5)


def test_the_reference_is_the_original_too(golden):
    """tests/reference.py reads the original names by itself; that makes it a judge of our exports."""
    model = reference_model(golden.directory)
    logits = model(golden.input_ids, torch.arange(LENGTH).expand(2, -1), block_causal_mask(LENGTH, 8))
    torch.testing.assert_close(logits, golden.block_causal_logits, atol=1e-4, rtol=0)
    target = golden.labels != -100
    nll = one_view_nll(model, golden.input_ids, golden.noisy_ids, target, 8)
    torch.testing.assert_close(nll, golden.token_nll[target], atol=5e-5, rtol=0)
    assert nll.mean().item() == pytest.approx(golden.expected["loss"], abs=1e-5)


def test_bfloat16_stays_close(golden):
    """Half precision of the whole path, router and scores in fp32: the loss moves by about a percent."""
    policy = load_policy(golden.directory, dtype="bfloat16")
    router = policy.model.model.layers[1].mlp.gate
    assert router.e_score_correction_bias.dtype == torch.float32
    with torch.no_grad():
        scores = policy(golden_batch(golden))
    assert scores.logprob_N.dtype == torch.float32
    assert -scores.logprob_N.mean().item() == pytest.approx(golden.expected["loss"], rel=0.03)
