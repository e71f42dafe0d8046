"""Rollouts of an older policy, by enumeration: with the decoder's log-probabilities the gradient is the true one.

The policy is a table of logits. Every response comes once, its advantage times its probability under the policy that
decoded, so that a loss over the rollouts is an expectation.
"""

import itertools
import json
import time

import numpy as np
import pytest
import torch

from benchmarks.local_client import LocalCall, LocalClient, Weights
from dfactory.algorithms.policy_gradient import PolicyGradient
from dfactory.algorithms.rollouts import rollout_views
from dfactory.engine.replay import join
from dfactory.noise import RandomMask
from dfactory.recipe import Recipe, load_recipe
from dfactory.rl.actors import RolloutActor
from dfactory.rl.rollouts import DecodedGroup, GroupCall, RolloutBatch, ScoredRollout
from dfactory.rl.rows import RolloutRows, at_targets, by_rollout
from dfactory.rl.source import RolloutSource
from dfactory.rl.weights import WeightSet
from dfactory.types import FinishReason, Rollout, TokenScores, ViewBatch
from tests.engine.conftest import ROOT
from tests.enumerated import MASK, VOCABULARY
from tests.rl.test_ratio import run  # noqa: F401  (a fixture)
from tests.rl.test_source import ROLLOUTS, FakeClient

ADVANTAGES = torch.tensor([1.0, -0.4, 0.2])  # by token
DRIFT, DRAWS = 0.5, 40  # standard deviation of the logits' move between decoding and the step; how many moves
WIDE = {"epsilon": 1.0, "epsilon_high": 1e9}  # nothing is clipped
BLOCK = 8  # of rollouts from the controller
LEARNER = {"old_policy": "learner"}


def response(prompt: list[int], tokens: tuple[int, ...], logprob: list[float], block_size: int) -> Rollout:
    """All tokens of a block in one forward."""
    one = list(range(len(tokens))) if block_size == 1 else [0] * len(tokens)
    forwards = [1] * (len(tokens) if block_size == 1 else 1)
    ids = list(tokens)
    return Rollout(prompt, ids, one, logprob, one, [], block_size, forwards, ids, len(forwards), FinishReason.LENGTH)


def gradient_of(source: RolloutSource, objective: PolicyGradient, logprob_of, table: torch.Tensor) -> torch.Tensor:
    """Of the objective, to be maximised, with respect to the table."""
    source.version = 1
    whole = join(source.next_window())
    terms = objective(whole, scores(logprob_of(table, whole)))
    return -torch.autograd.grad(terms.loss["policy"].total, table)[0]


def scores(logprob_N: torch.Tensor) -> TokenScores:
    hit_N = torch.zeros(len(logprob_N), dtype=torch.bool)
    return TokenScores(logprob_N, logprob_N.detach(), hit_N, hit_N.long(), logprob_N.detach())


def source_of(rollouts: list[ScoredRollout], logprob_of, table: torch.Tensor, views, block_size: int, **options):
    return RolloutSource(
        FakeClient(rollouts),
        lambda: iter([]),
        lambda batch: scores(logprob_of(table, batch).detach()),
        views,
        block_size=block_size,
        row_length=64,
        rank=0,
        world_size=1,
        micro_batch_rows=1,
        **options,
    )


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0).item()


# --- a token, by its trace --------------------------------------------------------------------------------------------


def token_logprob(table: torch.Tensor, batch: ViewBatch) -> torch.Tensor:
    return table.log_softmax(-1)[batch.target_ids_N]


def cosine_of_a_token(seed: int, version: int, importance_cap: float | None = None, **options) -> float:
    """Between the gradient on all rollouts of one token, decoded by a policy DRIFT away, and the true one."""
    torch.manual_seed(seed)
    now = torch.randn(VOCABULARY, requires_grad=True)
    then_V = (now.detach() + DRIFT * torch.randn(VOCABULARY)).log_softmax(-1)
    rollouts = [
        ScoredRollout(n, 0, response([0], (n,), [then_V[n].item()], 2), 0.0, (then_V[n].exp() * a).item(), version)
        for n, a in enumerate(ADVANTAGES)
    ]
    views = rollout_views(Recipe(stage="rl", policy_loss="trace"), RandomMask(MASK, seed=1, low=0.3, high=0.8))
    source = source_of(rollouts, token_logprob, now, views, 2, traces=True, **options)
    objective = PolicyGradient(**WIDE, importance_cap=importance_cap)
    found = gradient_of(source, objective, token_logprob, now)
    truth = torch.autograd.grad((now.softmax(-1) * ADVANTAGES).sum(), now)[0]
    return cosine(found, truth)


STALE, FRESH = 0, 1  # versions of rollouts for a learner at version 1


@pytest.mark.parametrize(
    "version, options",
    [
        (STALE, {}),
        (STALE, LEARNER | {"importance_cap": 1e9}),
        (FRESH, {"importance_cap": 1e9}),
        (FRESH, {"importance_cap": 1e9, "knows_ratio_1": True}),
    ],
    ids=["stale, with the record", "stale, by weight", "fresh, by weight", "fresh, without a pass of their own"],
)
def test_the_gradient_on_tokens_of_another_policy_is_the_true_one(version, options):
    assert min(cosine_of_a_token(seed, version, **options) for seed in range(DRAWS)) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("version, options", [(STALE, LEARNER), (FRESH, {})], ids=["stale", "fresh"])
def test_without_the_record_it_is_another_one(version, options):
    found = [cosine_of_a_token(seed, version, **options) for seed in range(DRAWS)]
    assert np.mean(found) < 0.99
    assert min(found) < 0.95


def test_the_weight_is_truncated():
    recorded_N = torch.tensor([-3.0, -1.0, -0.5])
    (batch,) = _window(recorded_N.tolist())
    log_now = torch.tensor([0.2, 0.3, 0.5]).log()
    expected = (log_now - recorded_N).exp().clamp(max=2.0)
    assert expected[0] == 2.0 > expected[1]
    torch.testing.assert_close(batch.columns["recorded_logprob_N"][batch.target_ids_N.argsort()], recorded_N)
    metrics = PolicyGradient(importance_cap=2.0)(batch, scores(batch.columns["old_logprob_N"])).metrics
    assert float(metrics["importance_gap"].total) == pytest.approx((expected - 1).abs().sum().item())
    assert "importance_gap" not in PolicyGradient()(batch, scores(batch.columns["old_logprob_N"])).metrics


def _window(recorded: list[float]) -> list[ViewBatch]:
    rollouts = [ScoredRollout(n, 0, response([0], (n,), [recorded[n]], 2), 0.0, 1.0, FRESH) for n in range(VOCABULARY)]
    views = rollout_views(Recipe(stage="rl", policy_loss="trace"), RandomMask(MASK, seed=1, low=0.3, high=0.8))
    table = torch.tensor([0.2, 0.3, 0.5]).log()
    source = source_of(rollouts, token_logprob, table, views, 2, traces=True)
    source.version = 1
    return source.next_window()


# --- a sequence, by an ELBO that is its likelihood --------------------------------------------------------------------


def pair_logprob(table: torch.Tensor, batch: ViewBatch) -> torch.Tensor:
    """Two tokens in blocks of one, all masked: log p(second | first) needs the first, which the clean stream holds."""
    position_N = batch.position_ids_RS.flatten()[batch.target_index_N]
    first_D = torch.zeros(len(batch.document_id_D), dtype=torch.int64)
    is_first_N = position_N == 1
    first_D[batch.document_N[is_first_N]] = batch.target_ids_N[is_first_N]
    row_N = torch.where(is_first_N, VOCABULARY, first_D[batch.document_N])
    return table.log_softmax(-1)[row_N, batch.target_ids_N]


def cosine_of_a_pair(seed: int, **options) -> float:
    torch.manual_seed(seed)
    now = torch.randn(VOCABULARY + 1, VOCABULARY, requires_grad=True)
    then = (now.detach() + DRIFT * torch.randn(now.shape)).log_softmax(-1)
    gain = torch.randn(VOCABULARY, VOCABULARY)
    rollouts = []
    for first, second in itertools.product(range(VOCABULARY), repeat=2):
        old = np.array([then[VOCABULARY, first].item(), then[first, second].item()], np.float32)
        advantage = (old.sum().item(), gain[first, second].item())
        rollout = response([0], (first, second), [9.0, 9.0], 1)
        value = float(np.exp(advantage[0]) * advantage[1])
        rollouts.append(ScoredRollout(len(rollouts), 0, rollout, 0.0, value, STALE, old))
    masks = RandomMask(MASK, seed=1, low=1.0, high=1.0)
    source = source_of(
        rollouts, pair_logprob, now, lambda document, index: (document, masks(document, index)), 1, **options
    )
    found = gradient_of(source, PolicyGradient("sequence", normaliser="sum", **WIDE), pair_logprob, now)
    p = now.softmax(-1)
    truth = torch.autograd.grad((p[VOCABULARY][:, None] * p[:VOCABULARY] * gain).sum(), now)[0]
    return cosine(found, truth)


def test_the_gradient_on_sequences_that_their_actor_scored_is_the_true_one():
    assert min(cosine_of_a_pair(seed) for seed in range(DRAWS)) == pytest.approx(1.0, abs=1e-5)
    without = [cosine_of_a_pair(seed, **LEARNER) for seed in range(DRAWS)]
    assert np.mean(without) < 0.98
    assert min(without) < 0.9


# --- what travels between rollout actor and learner -------------------------------------------------------------------


@pytest.mark.parametrize("row_length", [24, 40, 64])
def test_numbers_at_targets_survive_however_rows_are_cut(row_length):
    """Those of one layout, put on another."""
    masks = RandomMask(99, seed=1, low=0.3, high=0.8, complementary=True, num_views=2)
    views = lambda document, index: (document, masks(document, index))  # noqa: E731
    batches = RolloutRows(views, 4, row_length).build(ROLLOUTS)
    value_N = [batch.target_ids_N * 100.0 + batch.t_N for batch in batches]
    sent = by_rollout(batches, value_N, len(ROLLOUTS))
    for rank in range(2):
        for batch in RolloutRows(views, 4, 32, world_size=2).build(ROLLOUTS, rank):
            found_N = at_targets(batch, sent, batch.columns["target_number_N"])
            torch.testing.assert_close(found_N, batch.target_ids_N * 100.0 + batch.t_N)


@pytest.fixture(scope="module")
def actor() -> RolloutActor:
    """One of a recipe with ELBO views and stale rollouts, without Ray."""
    keys = [
        "policy_loss=ebpo",
        "max_staleness=1",
        "model_name_or_path=tiny",
        "eval_datasets=[]",
        "eval_decode_prompts=0",
    ]
    return RolloutActor(load_recipe(ROOT / "recipes/quickstart/rl.yaml", [*keys, "row_length=512"]), ".")


def test_a_rollout_actor_scores_the_views_that_learners_train_on(actor):
    prompts = [list(range(5, 5 + length)) for length in (9, 20)]
    groups = actor.generate([GroupCall(n, prompt, [n << 16, n << 16 | 1]) for n, prompt in enumerate(prompts)])
    rollouts = [
        ScoredRollout(group.number, index, rollout, 0.0, 1.0, 0, group.old_logprobs[index])
        for group in groups
        for index, rollout in enumerate(group.rollouts)
    ]
    rows = RolloutRows(actor.rows.make_views, 16, 300, train_after_eos=False)
    for batch in rows.build(rollouts):
        with torch.no_grad():
            expected_N = actor.policy.score(batch).logprob_N
        found_N = at_targets(batch, [one.old_logprob for one in rollouts], batch.columns["target_number_N"])
        torch.testing.assert_close(found_N, expected_N, atol=1e-4, rtol=1e-4)
    assert groups[1].decoder_gap is None
    assert 0 < groups[0].decoder_gap < 0.2


# --- the controller ---------------------------------------------------------------------------------------------------


class LocalActor:
    """Answers every group with whole blocks, of odd and even first tokens."""

    def __init__(self):
        self.version = -1
        self.process, self.set_weights, self.generate = map(LocalCall, (lambda: None, self._set, self._generate))

    def _set(self, weights: WeightSet) -> None:
        self.version = weights.version

    def _generate(self, calls: list[GroupCall]) -> list[DecodedGroup]:
        return [DecodedGroup(c.number, self.version, [self._answer(c, n) for n in c.noise_ids], 0.0) for c in calls]

    def _answer(self, call: GroupCall, noise: int) -> Rollout:
        ids = (5 + noise % 2,) * (-len(call.prompt_ids) % BLOCK or BLOCK)
        return response(call.prompt_ids, ids, [0.0] * len(ids), BLOCK)


class SlowSteps(LocalClient):
    """A learner's step takes a while, in which actors decode."""

    def publish(self, version: int, groups: Weights) -> dict[str, float]:
        published = super().publish(version, groups)
        time.sleep(0.05)
        return published


@pytest.fixture
def staleness(tmp_path):
    """staleness(state, windows, key, ...): of each window of a source from that state on, and the state that it leaves."""
    (tmp_path / "reward.py").write_text(
        "def odd(prompts, completions, completion_ids, **columns):\n    return [float(i[0] % 2) for i in completion_ids]\n"
    )
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "number {n}"}}\n' for n in range(12)))

    def run_on(state: dict, windows: int, *keys: str) -> tuple[list[float], dict]:
        base = [f"datasets=[{{path: {tmp_path}/prompts.jsonl}}]", f"reward_funcs=['{tmp_path}/reward.py:odd']"]
        base += ["model_name_or_path=tiny", f"block_size={BLOCK}", "num_generations=2", "prompts_per_step=3"]
        base += ["eval_datasets=[]", "eval_decode_prompts=0", "reward_workers=1", f"output_dir={tmp_path}/run"]
        recipe = load_recipe(ROOT / "recipes/quickstart/rl.yaml", [*base, *keys])
        client, masks = (
            SlowSteps(recipe, LocalActor(), timeout_s=60),
            RandomMask(99, seed=1, low=0.3, high=0.8, complementary=True),
        )
        source = RolloutSource(
            client,
            weights=lambda: iter([]),
            score=lambda batch: scores(-batch.target_ids_N.float()),
            make_views=lambda document, index: (document, masks(document, index)),
            block_size=BLOCK,
            row_length=256,
            rank=0,
            world_size=1,
            micro_batch_rows=1,
            num_iterations=recipe.num_iterations,
            traces=True,
        )
        source.load_state_dict(state)
        found = []
        for _ in range(windows):
            source.next_window()
            found.append(source.metrics["staleness"])
        client.close()
        return found, source.state_dict()

    return run_on


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
@pytest.mark.parametrize("num_iterations", [1, 2, 4])
def test_rollouts_are_at_most_max_staleness_versions_old(staleness, num_iterations, max_staleness):
    """By the source that learners use, whose version counts every step; also after a resume between two iterations."""
    keys = f"num_iterations={num_iterations}", f"max_staleness={max_staleness}"
    begun, state = staleness({"version": 0, "next_group": 0}, 4 * num_iterations + num_iterations // 2, *keys)
    went_on, _ = staleness(state, 3 * num_iterations, *keys)
    assert max(begun + went_on) <= max_staleness, (begun, went_on)
    if max_staleness >= num_iterations:
        assert max(begun) > 0 < max(went_on), "nothing was decoded ahead"


# --- a run ------------------------------------------------------------------------------------------------------------


class StaleClient(FakeClient):
    """The first step's rollouts at every step."""

    def next_batch(self, version, next_group):
        batch = super().next_batch(version, next_group)
        old = [ScoredRollout(r.group, r.index, r.rollout, r.reward, r.advantage, version=0) for r in batch.rollouts]
        return RolloutBatch(old, batch.next_group, batch.epoch, {"decoder_gap": 0.02 + 0.1 * version})


def test_a_run_tells_how_far_it_has_moved_from_the_policy_that_decoded(run, capsys):  # noqa: F811
    """The decoder's record is -1 everywhere: a step on fresh rollouts weighs, on stale ones the ratio says it."""
    first, second, _ = run("policy_loss=trace", "max_staleness=4", client=StaleClient())
    assert first["logprob_change"] == first["logprob_change_fresh"] == 0
    assert first["importance_gap"] > 0.1
    assert "logprob_change_fresh" not in second
    assert second["logprob_change"] > 0.1
    assert second["importance_gap"] == 0
    told = capsys.readouterr().err
    assert "decoder_gap 0.12 at step 2" in told
    assert told.count("decoder_gap") == 1
    learner, again, _ = run("policy_loss=trace", "max_staleness=4", "old_policy=learner", client=StaleClient())
    assert again["logprob_change"] == 0
    assert "logprob_change_fresh" not in again, "known to be 0, and compared at the first step alone"
    assert json.dumps(learner["loss"]) == json.dumps(first["loss"])
