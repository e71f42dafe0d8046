"""DPO by hand on four targets, at policy = reference, and against trl's own loss on the same numbers."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dfactory.algorithms.dpo import DPO
from dfactory.algorithms.elbo import elbo
from dfactory.engine.window import micro_loss
from dfactory.errors import ConfigError
from dfactory.models.registry import load_policy
from dfactory.noise import RandomMask
from dfactory.packing import PackedDocument, collate
from dfactory.recipe import load_recipe
from dfactory.types import AlignedDocument, TokenScores, ViewBatch
from tests.engine.conftest import GOLDEN, MASK
from tests.reference import block_causal_mask, reference_model

TRL_TYPES = {
    "sigmoid": DPO(),
    "hinge": DPO(loss_type="hinge"),
    "ipo": DPO(loss_type="ipo"),
    "robust": DPO(loss_type="robust", label_smoothing=0.2),
    "sigmoid_norm": DPO(length_normalize=True),
}


def pairs(reference_D, target_document_N, answer_length_D, t=0.5, num_views=2, fill=0) -> ViewBatch:
    """Documents 0, 1, ... side by side in one row, of four positions each; targets are given by their documents. After each
    answer the loss covers `fill` tokens more."""
    documents, targets = len(reference_D), len(target_document_N)
    zeros = torch.zeros(1, 4 * documents, dtype=torch.long)
    document_RS = torch.arange(documents).repeat_interleave(4)[None]
    return ViewBatch(
        input_ids_RS=zeros,
        position_ids_RS=zeros,
        document_RS=document_RS,
        view_RS=zeros,
        block_RS=zeros,
        trunk_RS=document_RS,
        target_index_N=4 * torch.tensor(target_document_N, dtype=torch.long),
        left_index_N=4 * torch.tensor(target_document_N, dtype=torch.long),
        clean_left_index_N=4 * torch.tensor(target_document_N, dtype=torch.long),
        target_ids_N=torch.zeros(targets, dtype=torch.long),
        real_N=torch.ones(targets, dtype=torch.bool),
        t_N=torch.full((targets,), t),
        elbo_weight_N=torch.full((targets,), 1 / t),
        document_id_D=torch.arange(documents) // 2,
        response_length_D=torch.tensor(answer_length_D) + fill,
        answer_length_D=torch.tensor(answer_length_D),
        num_views_D=torch.full((documents,), num_views),
        columns={"reference_elbo_D": torch.tensor(reference_D)},
    )


def scores(logprob_N: list[float]) -> TokenScores:
    logprob = torch.tensor(logprob_N, requires_grad=True)
    other = torch.zeros(len(logprob_N))
    return TokenScores(logprob, other, other.bool(), other.long(), other)


# Two views at t = 0.5, of weight 2, so the ELBO is the sum of the document's log-probabilities: -3 and -7.
FILL = 3
FOUR = pairs([-4.0, -5.0], [0, 0, 1, 1], [2, 4], fill=FILL)
SCORES = scores([-1.0, -2.0, -3.0, -4.0])


def preference(objective: DPO) -> float:
    return objective(FOUR, SCORES).loss["preference"].total.item()


def test_four_tokens_by_hand():
    """score(chosen) = -3 + 4 = 1, score(rejected) = -7 + 5 = -2, delta = 3."""
    right, wrong = math.log(1 + math.exp(-0.3)), math.log(1 + math.exp(0.3))
    assert preference(DPO()) == pytest.approx(right)
    assert preference(DPO(label_smoothing=0.1)) == pytest.approx(0.9 * right + 0.1 * wrong)
    assert preference(DPO(loss_type="robust", label_smoothing=0.1)) == pytest.approx((0.9 * right - 0.1 * wrong) / 0.8)
    assert preference(DPO(loss_type="hinge")) == pytest.approx(1 - 0.3)
    delta = 1 / 2 - -2 / 4  # per response token
    assert preference(DPO(loss_type="ipo")) == pytest.approx((delta - 5) ** 2)
    assert preference(DPO(length_normalize=True)) == pytest.approx(math.log(1 + math.exp(-0.1 * delta)))


def test_metrics_by_hand():
    terms = DPO(sft_loss_coef=0.5)(FOUR, SCORES)
    assert {
        name: mean.total.item() / mean.count for name, mean in terms.metrics.items() if "/" in name
    } == pytest.approx(
        {
            "rewards/chosen": 0.1,
            "rewards/rejected": -0.2,
            "rewards/margins": 0.3,
            "rewards/accuracies": 1.0,
            "logps/chosen": -3.0,
            "logps/rejected": -7.0,
            "logps/accuracies": 1.0,
        }
    )
    assert terms.loss["sft"].total.item() == pytest.approx(3)  # of the chosen answer, logged without its coefficient
    assert terms.loss["sft"].count == 2 + FILL  # its response tokens
    assert terms.weights == {"sft": 0.5}
    loss = micro_loss(terms, {"preference": 1.0, "sft": 2.0 + FILL}, 1).item()
    assert loss == pytest.approx(preference(DPO()) + 0.5 * 3 / (2 + FILL))
    assert not any(mean.total.requires_grad for mean in terms.metrics.values())


def test_gradient_pulls_the_sides_apart():
    objective, given = DPO(), scores([-1.0, -2.0, -3.0, -4.0])
    objective(FOUR, given).loss["preference"].total.backward()
    slope = 0.1 / (1 + math.exp(0.3))  # beta sigmoid(-beta delta)
    torch.testing.assert_close(given.logprob_N.grad, slope * torch.tensor([-1.0, -1.0, 1.0, 1.0]))


@pytest.mark.parametrize("objective", [DPO(sft_loss_coef=1.0), *TRL_TYPES.values()])
def test_policy_equal_to_reference(objective):
    """Margins are exactly 0, accuracy is that of a guess, the sigmoid's loss is log 2, and the gradient is finite."""
    given = scores([-0.3, -2.7, -31.4, -0.1])
    batch = pairs([0.0, 0.0], [0, 0, 1, 1], [2, 4], t=0.3, num_views=3)
    batch = batch.with_columns(reference_elbo_D=elbo(batch, given.logprob_N).detach())
    terms = objective(batch, given)
    for name in ("chosen", "rejected", "margins"):
        assert terms.metrics[f"rewards/{name}"].total.item() == 0
    assert terms.metrics["rewards/accuracies"].total.item() == 0.5  # of one pair
    if objective.loss_type in ("sigmoid", "robust"):
        assert terms.loss["preference"].total.item() == pytest.approx(math.log(2))
    sum(mean.total for mean in terms.loss.values()).backward()
    assert given.logprob_N.grad.isfinite().all()


def test_counts_are_known_before_the_forward():
    for objective in (DPO(), DPO(sft_loss_coef=1.0)):
        assert objective.counts(FOUR) == {name: mean.count for name, mean in objective(FOUR, SCORES).loss.items()}


def test_a_micro_batch_without_pairs():
    given = scores([])
    terms = DPO(sft_loss_coef=1.0)(pairs([], [], []), given)
    assert all(mean.total.item() == mean.count == 0 for mean in (*terms.loss.values(), *terms.metrics.values()))
    sum(mean.total for mean in terms.loss.values()).backward()  # DeepSpeed runs it on every rank


# --- block size 1 and trl --------------------------------------------------------------------------------------------

PROMPT, CHOSEN, REJECTED = [3, 14, 15], [92, 65, 35, 89], [79, 32]


def block_size_1() -> ViewBatch:
    """The pair with every response token masked: t = 1, and a block of one token sees all tokens before it."""
    views = RandomMask(MASK, seed=0, low=1.0, high=1.0)
    documents = []
    for answer in (CHOSEN, REJECTED):
        ids = np.array(PROMPT + answer, np.int32)
        documents.append(AlignedDocument(7, ids, np.arange(len(ids)) >= len(PROMPT), 1))
    return collate([[PackedDocument(document, views(document, 0)) for document in documents]], 1)


def exact_log_likelihood(model, answer: list[int]) -> list[float]:
    """log p(token | all tokens before it, [M] in its place), one forward of plain torch a token."""
    values = []
    for index, token in enumerate(answer):
        ids = torch.tensor([[*PROMPT, *answer[:index], MASK]])
        position = torch.arange(ids.shape[1])[None]
        values.append(model(ids, position, block_causal_mask(ids.shape[1], 1))[0, -1].log_softmax(-1)[token].item())
    return values


@pytest.fixture(scope="module")
def policy_and_reference():
    """((TokenScores of ours, log-likelihoods of plain torch), the same for another model), on the pair in blocks of 1."""
    found = []
    for noise in (0.0, 0.05):
        policy, plain = load_policy(GOLDEN, dtype="float32"), reference_model(GOLDEN)
        weight = plain.tensors["lm_head.weight"]
        weight += noise * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            policy.model.lm_head.weight.copy_(weight)
            found.append((policy.score(block_size_1()), [exact_log_likelihood(plain, a) for a in (CHOSEN, REJECTED)]))
    return found


def test_in_blocks_of_one_token_the_elbo_is_the_log_likelihood(policy_and_reference):
    for given, exact in policy_and_reference:
        expected = torch.tensor([sum(values) for values in exact])
        torch.testing.assert_close(elbo(block_size_1(), given.logprob_N), expected, rtol=0, atol=1e-5)


def trl_loss(loss_type: str, objective: DPO, policy: list[list[float]], reference: list[list[float]]):
    """What trl's DPOTrainer computes from per-token log-probabilities of (chosen, rejected): (loss, metrics)."""
    from trl import DPOTrainer

    longest = max(map(len, policy))
    padded = torch.tensor([values + [0.0] * (longest - len(values)) for values in policy])
    mask = torch.tensor([[0] + [1] * len(values) + [0] * (longest - len(values)) for values in policy])
    zeros = torch.zeros_like(padded)
    outputs = SimpleNamespace(log_probs=padded, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    inputs |= {
        f"ref_{side}_logps": torch.tensor([sum(v)]) for side, v in zip(("chosen", "rejected"), reference, strict=True)
    }
    metrics = {"eval": {name: [] for name in ("entropy", "mean_token_accuracy")}}
    for kind in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"):
        metrics["eval"][kind] = []
    for kind in ("logits/chosen", "logits/rejected", "logps/chosen", "logps/rejected"):
        metrics["eval"][kind] = []
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=accelerator, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[loss_type], loss_weights=[1.0],
        beta=objective.beta, label_smoothing=objective.label_smoothing, use_weighting=False, _metrics=metrics,
        _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
    return loss.item(), {name: values[0] for name, values in metrics["eval"].items()}


@pytest.mark.parametrize("loss_type", [*TRL_TYPES, "sft"])
def test_equals_trl_in_blocks_of_one_token(policy_and_reference, loss_type):
    """trl's own method, given the exact log-likelihoods; ours, given the scores of one view."""
    (given, exact), (reference, reference_exact) = policy_and_reference
    batch = block_size_1()
    batch = batch.with_columns(reference_elbo_D=elbo(batch, reference.logprob_N))
    objective = TRL_TYPES.get(loss_type, DPO(sft_loss_coef=1.0))
    terms = objective(batch, given)
    loss, metrics = trl_loss(loss_type, objective, exact, reference_exact)
    ours = terms.loss["sft" if loss_type == "sft" else "preference"]
    assert ours.total.item() / ours.count == pytest.approx(loss, rel=1e-5)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert terms.metrics[name].total.item() == pytest.approx(metrics[name], rel=1e-5, abs=1e-6)


# --- recipes ---------------------------------------------------------------------------------------------------------

BAD_KEYS = {
    "beta 0": (["beta=0"], "beta 0 with stage dpo"),
    "smoothed ipo": (["loss_type=ipo", "label_smoothing=0.1"], "label_smoothing 0.1 with loss_type ipo"),
    "robust at a half": (["loss_type=robust", "label_smoothing=0.5"], "label_smoothing 0.5 with loss_type robust"),
    "adapter": (["reference=adapter"], "reference adapter without use_peft"),
    "path": (["reference_path=x"], "with reference precomputed only"),
    "no mask ratio": (["noise_range_low=0"], "noise_range_low 0 with stage dpo divides by zero"),
    "trl's name": (["loss_type=sigmoid_norm"], "loss_type sigmoid_norm"),
}


@pytest.mark.parametrize("keys, message", BAD_KEYS.values(), ids=BAD_KEYS)
def test_keys_that_make_no_sense(tmp_path, keys, message):
    recipe = tmp_path / "dpo.yaml"
    recipe.write_text("stage: dpo\nmodel_name_or_path: tiny\ndatasets: [{path: x.jsonl}]\noutput_dir: x\n")
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe, keys)
