"""benchmarks/opponent*.py: the opponent is exact, so that a ratio against it compares the same work."""

import random

import pytest
import torch

from benchmarks import opponent_training, workload
from benchmarks.opponent import Peer, TargetLoss, noisy_clean_mask, target_nll
from benchmarks.opponent_decoding import PeerRules, decode_in_batches
from benchmarks.opponent_training import NoisyRow, PeerTraining, micro_batches
from dfactory.models.registry import load_policy
from dfactory.models.saving import save_policy
from tests.decoding.uncached import Settings, block_causal_logits, processed, uncached
from tests.reference import one_view_nll, plain_model, reference_model, step_mask

VOCABULARY, BLOCK = 160, 8
MASK, EOS = workload.special_ids(VOCABULARY)
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 32}
KINDS = {
    "small": SIZES | EXPERTS | {"intermediate_size": 96, "initializer_range": 0.1},
    "qwen3-1.7b": SIZES | {"intermediate_size": 96, "initializer_range": 0.1, "tie_word_embeddings": False},
    "smollm2": SIZES | {"intermediate_size": 96, "initializer_range": 0.1},
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """By shape, with a head that chooses clearly and never EOS."""
    made = {}

    def make(shape: str):
        if shape not in made:
            folder = tmp_path_factory.mktemp(shape)
            config = workload.write_config(folder / "config_only", VOCABULARY, shape, **KINDS[shape])
            policy = load_policy(config, dtype="float32", init_weights="random")
            workload.choose_clearly(policy, VOCABULARY)
            save_policy(policy, folder)
            made[shape] = folder
        return made[shape]

    return make


def reference(shape, model_dir):
    return reference_model(model_dir) if shape == "small" else plain_model(model_dir)


def noisy_rows(*lengths: int) -> list[NoisyRow]:
    """Two complementary views of documents of these lengths, which are whole blocks; the first block is prompt."""
    generator = torch.Generator().manual_seed(0)
    rows, targets = [], sum(lengths) - BLOCK * len(lengths)
    for length in lengths:
        clean_L = torch.randint(0, VOCABULARY - 3, (length,), generator=generator)
        first_L = (torch.rand(length, generator=generator) < 0.5) & (torch.arange(length) >= BLOCK)
        for target_L in (first_L, ~first_L & (torch.arange(length) >= BLOCK)):
            noisy_L = torch.where(target_L, MASK, clean_L)
            rows.append(NoisyRow(clean_L, noisy_L, target_L, target_L.float() / targets))
    return rows


@pytest.mark.parametrize("shape", KINDS)
def test_losses_and_gradients_of_a_step_are_those_of_the_reference(shape, model_dir, tmp_path, monkeypatch):
    """Over three steps, in micro-batches of several lengths with padding, and with logits of a few targets at a time."""
    monkeypatch.setattr(opponent_training, "PADDED", 0.15)
    monkeypatch.setattr("benchmarks.opponent.LOGIT_BYTES", {"cpu": 4 * VOCABULARY * 7})
    directory, rows = model_dir(shape), noisy_rows(24, 40, 32, 16)
    assert [len(batch) for batch in micro_batches(rows)] == [4, 3, 1]
    keys = {"block_size": BLOCK, "learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 1.0}
    training = PeerTraining(workload.sft_recipe(directory, tmp_path, VOCABULARY, **keys))
    slow = reference(shape, directory)
    parameters = [parameter.requires_grad_() for parameter in slow.parameters().values()]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)
    for _ in range(3):
        terms = [
            (row.factor_L[row.target_L] * one_view_nll(slow, *(part[None] for part in row[:3]), BLOCK)).sum()
            for row in rows
        ]
        sum(terms).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        assert training.sums(rows).tolist() == pytest.approx([term.item() for term in terms], rel=2e-5)
        assert training.train(rows).loss == pytest.approx(sum(terms).item(), rel=2e-5)


def test_the_mask_is_that_of_the_table():
    assert torch.equal(noisy_clean_mask(24, BLOCK, torch.device("cpu")), step_mask(24, BLOCK) == 0)


def test_the_fused_loss_has_the_gradients_of_cross_entropy(monkeypatch):
    monkeypatch.setattr("benchmarks.opponent.LOGIT_BYTES", {"cpu": 4 * 50 * 4})
    torch.manual_seed(0)
    hidden_NH, head_VH = torch.randn(10, 6, requires_grad=True), torch.randn(50, 6, requires_grad=True)
    target_N, factor_N = torch.randint(0, 50, (10,)), torch.rand(10)
    nll_N = torch.nn.functional.cross_entropy(hidden_NH @ head_VH.T, target_N, reduction="none")
    expected = torch.autograd.grad(3 * (factor_N * nll_N).sum(), (hidden_NH, head_VH))
    loss, nll = TargetLoss.apply(hidden_NH, head_VH, target_N, factor_N)
    torch.testing.assert_close(nll, nll_N.sum())
    torch.testing.assert_close(loss, (factor_N * nll_N).sum())
    torch.testing.assert_close(torch.autograd.grad(3 * loss, (hidden_NH, head_VH)), expected)
    torch.testing.assert_close(target_nll(hidden_NH, head_VH, target_N), nll_N.detach())


@pytest.mark.parametrize("shape", KINDS)
@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_and_steps_are_those_of_the_uncached_loop(shape, rows, model_dir):
    """Ragged prompts, two of them equal, one shorter than a block."""
    directory, rng = model_dir(shape), random.Random(0)
    prompts = [rng.choices(range(VOCABULARY - 3), k=length) for length in (5, 21, 8, 30)]
    prompts.append(prompts[1])
    keys = {"block_size": BLOCK, "max_new_tokens": 16, "mask_token_id": MASK, "eos_token_id": EOS, "threshold": 0.6}
    keys |= {"min_commit": 2, "suppressed_ids": (MASK, VOCABULARY - 3)}
    answers = decode_in_batches(Peer(directory), prompts, PeerRules(**keys), rows)
    slow = reference_model(directory) if shape == "small" else load_policy(directory, dtype="float32")
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = uncached(slow, prompt, Settings(**keys))
        assert answer.token_ids == expected.token_ids
        assert answer.commit_step == expected.commit_step


def test_a_response_ends_with_the_block_that_holds_eos(model_dir):
    """EOS is what the model says at its third token: of the first prompt, not of the second."""
    directory, rng = model_dir("small"), random.Random(1)
    prompts = [rng.choices(range(VOCABULARY - 3), k=length) for length in (13, 19)]
    keys = {"block_size": BLOCK, "max_new_tokens": 24, "mask_token_id": MASK, "threshold": 0.6, "min_commit": 2}
    plain = uncached(reference_model(directory), prompts[0], Settings(**keys, eos_token_id=EOS))
    keys["eos_token_id"] = plain.token_ids[4]
    answers = decode_in_batches(Peer(directory), prompts, PeerRules(**keys, suppressed_ids=()), 2)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.token_ids == uncached(reference_model(directory), prompt, Settings(**keys)).token_ids
    assert len(answers[0].token_ids) < 24


def test_sampled_tokens_follow_the_model(model_dir):
    """All of a block in one forward at temperature 1: each token comes out as often as the model says."""
    directory = model_dir("small")
    prompt = random.Random(2).choices(range(VOCABULARY - 3), k=8)
    keys = {"block_size": BLOCK, "max_new_tokens": 8, "mask_token_id": MASK, "eos_token_id": EOS, "threshold": 0.0}
    rules = PeerRules(**keys, min_commit=8, suppressed_ids=(MASK,), temperature=1.0)
    torch.manual_seed(0)
    answers = decode_in_batches(Peer(directory), [prompt] * 1000, rules, 1000)
    logits_SV = block_causal_logits(reference_model(directory), torch.tensor(prompt + [MASK] * BLOCK), BLOCK)
    p_V = processed(logits_SV[BLOCK], Settings(**keys, suppressed_ids=(MASK,), temperature=1.0))
    drawn = [answer.token_ids[0] for answer in answers]
    likely = int(p_V.argmax())
    assert drawn.count(likely) / 1000 == pytest.approx(p_V[likely].item(), abs=0.05)
