"""The clipped policy gradient by hand, on four targets of two rollouts."""

import dataclasses
import math

import pytest
import torch

from dfactory.algorithms.policy_gradient import PolicyGradient
from dfactory.engine.window import micro_loss, window_counts
from dfactory.types import TokenScores, ViewBatch
from tests.algorithms.test_dpo import pairs, scores

RATIOS = [1.1, 1.5, 0.9, 0.5]  # of the four targets, the first two of the rollout of advantage 2
OLD = [-1.0, -2.0, -3.0, -0.5]
REFERENCE = [-1.2, -1.5, -3.5, -1.0]


def rollouts(document_N: list[int], **columns) -> ViewBatch:
    """Two rollouts of 4 and 2 response tokens, advantages 2 and -1, weight 2 at each target; columns can be changed."""
    batch = pairs([0.0, 0.0], document_N, [4, 2])
    given = {
        "advantage_D": [2.0, -1.0],
        "rollout_D": [3, 8],
        "share_D": [1.0, 1.0],
        "response_blocks_D": [2, 1],
        "old_logprob_N": OLD,
        "reference_logprob_N": REFERENCE,
    }
    tensors = {name: torch.tensor(column) for name, column in (given | columns).items()}
    return dataclasses.replace(batch, columns=tensors)


FOUR = rollouts([0, 0, 1, 1])


def now(ratios: list[float] = RATIOS) -> TokenScores:
    return scores([old + math.log(ratio) for old, ratio in zip(OLD, ratios, strict=True)])


def policy_term(objective: PolicyGradient, batch: ViewBatch = FOUR) -> tuple[float, float]:
    total, count = objective(batch, now()).loss["policy"]
    return total.item(), count


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "aggregation, divisors, count", [("grpo", (4, 2), 2), ("dapo", (1, 1), 6), ("dr_grpo", (1, 1), 20)]
)
def test_four_tokens(aggregation, divisors, count):
    """A 2: gains 1.1 x 2 and the clipped 1.2 x 2. A -1: -0.9, and -0.8 of the clipped 0.8. All of view weight 2."""
    objective = PolicyGradient(aggregation=aggregation, max_new_tokens=10)
    gain = 2 * (1.1 + 1.2) * 2 / divisors[0] + 2 * (0.9 + 0.8) * -1 / divisors[1]
    assert policy_term(objective) == (pytest.approx(-gain), count)


@pytest.mark.parametrize(
    "ratio, advantage, gain, moves",
    [(1.5, 1, 1.3, False), (0.5, 1, 0.5, True), (1.5, -1, -1.5, True), (0.5, -1, -0.8, False), (1.25, 1, 1.25, True)],
)
def test_clipping_by_side_and_sign(ratio, advantage, gain, moves):
    """Clipped, and so without gradient, is only what would gain by moving on; at 0.8 below and 1.3 above."""
    batch = rollouts([0], advantage_D=[float(advantage), 0.0], old_logprob_N=[-1.0])
    given = scores([-1.0 + math.log(ratio)])
    terms = PolicyGradient(epsilon=0.2, epsilon_high=0.3, aggregation="dapo")(batch, given)
    terms.loss["policy"].total.backward()
    assert terms.loss["policy"].total.item() == pytest.approx(-2 * gain)  # the view's weight is 2
    assert given.logprob_N.grad.item() == pytest.approx(-2 * ratio * advantage if moves else 0)
    assert terms.metrics["clip_ratio"].total == (not moves)


@pytest.mark.parametrize("objective, factor", [("grpo", (2, 1)), ("mean", (2, 1)), ("dapo", (6 / 4, 6 / 4))])
def test_lengths_are_those_of_answers_without_their_fill(objective, factor):
    """Two tokens are real of each rollout, of four and two: what is divided by its own length doubles for the first."""
    objective = dataclasses.replace(OBJECTIVES[objective], kl_coef=0.0)
    filled = dataclasses.replace(FOUR, answer_length_D=torch.tensor([2, 2]))

    def gradient(batch: ViewBatch) -> torch.Tensor:
        given = scores(OLD)
        total, count = objective(batch, given).loss["policy"]
        return torch.autograd.grad(total / count, given.logprob_N)[0]

    expected = gradient(FOUR) * torch.tensor([factor[0]] * 2 + [factor[1]] * 2)
    torch.testing.assert_close(gradient(filled), expected)


@pytest.mark.parametrize("clip", ["ppo", "unconditional"])
def test_importance_weights_multiply_gains_as_constants(clip):
    weight_N = torch.tensor([0.5, 1.0, 2.0, 1.0])
    batch = FOUR.with_columns(recorded_logprob_N=torch.tensor(OLD) - weight_N.log())
    objective = PolicyGradient(clip=clip, aggregation="dapo", importance_cap=3.0)
    given, plain = scores(OLD), scores(OLD)
    objective(batch, given).loss["policy"].total.backward()
    objective(FOUR, plain).loss["policy"].total.backward()
    torch.testing.assert_close(given.logprob_N.grad, plain.logprob_N.grad * weight_N)
    weighed = 2 * (0.5 + 1.0 + 2.0 + 1.0)  # of a view weight of 2
    assert float(objective.counts(batch, scores(OLD))["policy"]) == pytest.approx(6 if clip == "ppo" else weighed)
    gap = objective(batch, given).metrics["importance_gap"]
    assert (float(gap.total), gap.count) == (pytest.approx(1.5), 4)


@pytest.mark.parametrize(
    "options",
    [
        {"aggregation": "dapo", "kl_coef": 0.1},
        {"importance_cap": 2.0},
        {"clip": "unconditional"},
        {"level": "sequence"},
        {"level": "sequence", "normaliser": "block", "clip": "unconditional"},
    ],
    ids=str,
)
def test_where_no_step_lies_between_the_batch_need_not_say_the_old_log_probabilities(options):
    """Loss, metrics, denominators and gradient are what they are with the training forward's own ones."""
    objective = PolicyGradient(**options)
    batch = FOUR.with_columns(recorded_logprob_N=torch.tensor(OLD) + 0.5)
    without = {name: column for name, column in batch.columns.items() if name != "old_logprob_N"}
    results = []
    for one in (batch, dataclasses.replace(batch, columns=without)):
        given = scores(OLD)
        terms = objective(one, given)
        loss = micro_loss(terms, window_counts(objective, [one], [given], lambda table: None), 1)
        loss.backward()
        metrics = {name: [float(number) for number in mean] for name, mean in terms.metrics.items()}
        results.append((loss.item(), given.logprob_N.grad.tolist(), metrics))
    assert results[0] == results[1]


# --- sequences --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normaliser, divisors", [("sum", (1, 1)), ("mean", (4, 2)), ("block", (2, 1))])
def test_four_tokens_as_two_sequences(normaliser, divisors):
    """log rho is 2 (log 1.1 + log 1.5) and 2 (log 0.9 + log 0.5), over the normaliser."""
    objective = PolicyGradient(level="sequence", normaliser=normaliser, epsilon=0.9, epsilon_high=9.0)
    first, second = ((a * b) ** (2 / d) for a, b, d in ((1.1, 1.5, divisors[0]), (0.9, 0.5, divisors[1])))
    assert policy_term(objective) == (pytest.approx(-(2 * first - second)), 2)
    narrow = dataclasses.replace(objective, epsilon=0.01, epsilon_high=0.01)
    assert policy_term(narrow) == (pytest.approx(-(2 * 1.01 - 0.99)), 2)


def test_a_rollout_that_lies_in_two_rows_counts_once():
    """As three documents: the first rollout's two targets in rows of their own, each with half a share."""
    whole = rollouts([0, 0, 1, 1])
    parts = pairs([0.0] * 3, [0, 2, 1, 1], [4, 2, 4])
    columns = whole.columns | {
        "advantage_D": torch.tensor([2.0, -1.0, 2.0]),
        "rollout_D": torch.tensor([3, 8, 3]),
        "share_D": torch.tensor([0.5, 1.0, 0.5]),
        "response_blocks_D": torch.tensor([2, 1, 2]),
    }
    parts = dataclasses.replace(parts, columns=columns)
    for objective in OBJECTIVES.values():
        one, other = objective(whole, now()), objective(parts, now())
        assert {n: (m.total.item(), m.count) for n, m in other.loss.items()} == {
            n: (pytest.approx(m.total.item()), pytest.approx(m.count)) for n, m in one.loss.items()
        }


# --- the unconditional clip -------------------------------------------------------------------------------------------


def test_unconditional_clip_of_sequences():
    """Weights e^{log rho} clipped to [0.7, 1.2] whatever the advantage, constants; the gradient is that of log rho."""
    objective = PolicyGradient(level="sequence", normaliser="sum", clip="unconditional", epsilon=0.3)
    given = now()
    total, count = objective(FOUR, given).loss["policy"]
    log_ratio = 2 * math.log(1.1 * 1.5), 2 * math.log(0.9 * 0.5)
    assert count == pytest.approx(1.2 + 0.7)
    assert total.item() == pytest.approx(-(1.2 * 2 * log_ratio[0] + 0.7 * -1 * log_ratio[1]))
    total.backward()
    expected = [-1.2 * 2 * 2] * 2 + [-0.7 * -1 * 2] * 2  # weight, advantage, the view's weight
    torch.testing.assert_close(given.logprob_N.grad, torch.tensor(expected))


@pytest.mark.parametrize("aggregation, weights", [("grpo", (2 / 4, 2 / 2)), ("dapo", (2, 2)), ("dr_grpo", (2, 2))])
def test_unconditional_clip_of_tokens_is_self_normalised(aggregation, weights):
    """The mean of A log rho with weights that add up to 1: ratios clipped to [0.7, 1.2], times those of the targets."""
    objective = PolicyGradient(clip="unconditional", epsilon=0.3, aggregation=aggregation)
    weight = [1.1 * weights[0], 1.2 * weights[0], 0.9 * weights[1], 0.7 * weights[1]]
    gain = [2 * math.log(1.1), 2 * math.log(1.5), -math.log(0.9), -math.log(0.5)]
    total = sum(w * g for w, g in zip(weight, gain, strict=True))
    assert policy_term(objective) == (pytest.approx(-total), pytest.approx(sum(weight)))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_self_normalisation_divides_by_weights_below_1_too(level):
    """Two units of clipped ratio 0.1: the mean of their gains is what it is at ratio 1, and so is its gradient."""
    batch = rollouts([0, 1], advantage_D=[2.0, -1.0], old_logprob_N=[-1.0, -1.0])
    objective = PolicyGradient(
        level=level, normaliser="sum", aggregation="dapo", clip="unconditional", epsilon=0.99, epsilon_high=9.0
    )

    def gradient(ratio: float) -> torch.Tensor:
        # of a view weight of 2: a sequence's ratio is its token's to the power of 2
        given = scores([-1.0 + math.log(ratio) / (2 if level == "sequence" else 1)] * 2)
        counts = window_counts(objective, [batch], [given], lambda total: None)
        micro_loss(objective(batch, given), counts, world_size=1).backward()
        return given.logprob_N.grad

    assert objective.counts(batch, scores([-1.0 + math.log(0.1) / 2] * 2))["policy"] < 1.5
    torch.testing.assert_close(gradient(0.1), gradient(1.0))


# --- all of them ------------------------------------------------------------------------------------------------------

OBJECTIVES = {
    "grpo": PolicyGradient(kl_coef=0.1),
    "dapo": PolicyGradient(aggregation="dapo", kl_coef=0.1, kl_estimator="k2"),
    "dr_grpo": PolicyGradient(aggregation="dr_grpo", max_new_tokens=10),
    "mean": PolicyGradient(level="sequence"),
    "sum": PolicyGradient(level="sequence", normaliser="sum", kl_coef=0.1),
    "block": PolicyGradient(level="sequence", normaliser="block"),
    "unconditional sequences": PolicyGradient(level="sequence", clip="unconditional"),
    "unconditional tokens": PolicyGradient(clip="unconditional", kl_coef=0.1),
}
every_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl(estimator):
    """d = log p_ref - log p at each target, weight 2, over the 6 response tokens; logged without its coefficient."""
    batch, given = FOUR, scores(OLD)
    d = [-0.2, 0.5, -0.5, -0.5]
    terms = {"k2": [x * x / 2 for x in d], "k3": [math.exp(x) - x - 1 for x in d]}[estimator]
    slopes = {"k2": [-x for x in d], "k3": [1 - math.exp(x) for x in d]}[estimator]  # with respect to log p
    found = PolicyGradient(kl_coef=0.1, kl_estimator=estimator)(batch, given)
    total, count = found.loss["kl"]
    assert (total.item(), count) == (pytest.approx(2 * sum(terms)), 6)
    alone = dataclasses.replace(found, loss={"kl": found.loss["kl"]})
    loss = micro_loss(alone, {"kl": 6.0}, world_size=1)
    assert loss.item() == pytest.approx(0.1 * 2 * sum(terms) / 6)
    loss.backward()
    torch.testing.assert_close(given.logprob_N.grad, torch.tensor([0.1 * 2 * slope / 6 for slope in slopes]))


@every_objective
def test_counts_equal_those_of_the_terms(objective):
    terms = objective(FOUR, now())
    ahead = now() if objective.counts_need_scores else None
    assert objective.counts(FOUR, ahead) == {name: mean.count for name, mean in terms.loss.items()}
    assert not any(torch.as_tensor(mean.total).requires_grad for mean in terms.metrics.values())


@every_objective
def test_at_ratio_1_it_is_the_policy_gradient(objective):
    """The gradient of -sum A w log p: over the rollout's normaliser, and then over the term's count."""
    given = scores(OLD)
    terms = objective(FOUR, given)
    total, count = terms.loss["policy"]
    (gradient_N,) = torch.autograd.grad(total / count, given.logprob_N)
    response = {"sum": (1, 1), "block": (2, 1)}.get(objective.normaliser, (4, 2))
    if objective.level == "token" and objective.aggregation != "grpo":
        response = (1, 1)
    expected = torch.tensor([-2 * 2 / response[0]] * 2 + [1 * 2 / response[1]] * 2)
    torch.testing.assert_close(gradient_N, expected / count)
    assert terms.metrics["ratio_spread"].total == terms.metrics["logprob_change"].total == 0
    assert terms.metrics["clip_ratio"].total == 0


def test_how_far_the_policy_has_moved():
    """By target, and by unit: 2 log 1.65 / 4 and 2 log 0.45 / 2 of the two sequences."""
    metrics = PolicyGradient(level="sequence")(FOUR, now()).metrics
    moved = sum(abs(math.log(ratio)) for ratio in RATIOS)
    assert (metrics["logprob_change"].total.item(), metrics["logprob_change"].count) == (pytest.approx(moved), 4)
    spread = math.log(1.65) / 2 - math.log(0.45)
    assert (metrics["ratio_spread"].total.item(), metrics["ratio_spread"].count) == (pytest.approx(spread), 2)


@every_objective
def test_a_micro_batch_without_rollouts(objective):
    given, batch = scores([]), pairs([], [], [])
    empty = {name: column[:0] for name, column in FOUR.columns.items()}
    batch = dataclasses.replace(batch, columns=empty)
    terms = objective(batch, given)
    assert all(mean.total.item() == mean.count == 0 for mean in (*terms.loss.values(), *terms.metrics.values()))
    assert objective.counts(batch, given) == dict.fromkeys(terms.loss, 0.0)
    sum(mean.total for mean in terms.loss.values()).backward()  # DeepSpeed runs it on every rank
