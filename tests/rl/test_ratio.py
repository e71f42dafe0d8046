"""A run asserts that the ratio is 1 at the first step on new rollouts: the training loop on one rank, without Ray."""

import json

import pytest
import torch

from dfactory.algorithms.policy_gradient import PolicyGradient
from dfactory.errors import RolloutError
from dfactory.recipe import load_recipe
from dfactory.train import learn
from dfactory.types import TokenScores
from tests.engine.conftest import ROOT
from tests.rl.test_source import BLOCK, FakeClient, make_source

EBPO = ["policy_loss=ebpo", "num_views=2", "complementary=false", "row_length=32"]  # a rollout in two micro-batches


@pytest.fixture
def run(tmp_path):
    """run(key, ...) trains the quickstart's recipe on the rollouts of a client -> rows of metrics.jsonl."""

    def run(*keys: str, client: FakeClient | None = None) -> list[dict]:
        base = ["model_name_or_path=tiny", "max_length=16", "decode.max_new_tokens=10", f"block_size={BLOCK}"]
        base += [
            "warmup_steps=0",
            "learning_rate=0.01",
            "max_steps=3",
            f"output_dir={tmp_path}/run",
            "overwrite_output_dir=true",
        ]
        base += ["eval_datasets=[]", "eval_decode_prompts=0"]
        recipe = load_recipe(ROOT / "recipes/quickstart/rl.yaml", [*base, *keys])
        assert learn(recipe, client or FakeClient()) == 0
        return [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]

    return run


@pytest.mark.parametrize(
    "keys", [["policy_loss=trace"], EBPO, [*EBPO, "dtype=bfloat16"]], ids=["tokens", "sequences", "bfloat16"]
)
def test_only_the_first_of_several_steps_on_the_same_rollouts_has_ratio_1(run, keys):
    change = [row["logprob_change"] for row in run("num_iterations=2", *keys)]
    assert change[0] < 1e-5
    assert change[1] > 1e-3
    assert change[2] < 1e-5


@pytest.mark.parametrize(
    "keys, name, most",
    [
        (["policy_loss=trace"], "logprob_change_fresh", "0.0001"),
        (["policy_loss=trace", "dtype=bfloat16"], "logprob_change_fresh", "0.1"),
        (EBPO, "replay_gap", "0.0001"),
    ],
    ids=["tokens", "bfloat16", "sequences"],
)
def test_dropout_of_adapters_is_noticed(run, keys, name, most):
    """At the second step: an adapter starts as 0, and then dropout changes nothing."""
    with pytest.raises(RolloutError, match=rf"{name} \S+ at the first step on new rollouts.* {most} .*lora_dropout"):
        run("use_peft=true", "lora_dropout=0.5", *keys)


@pytest.mark.parametrize(
    "keys",
    [["policy_loss=trace"], ["policy_loss=trace", "kl_coef=0.1"], EBPO],
    ids=["tokens", "reference", "sequences"],
)
def test_without_a_pass_for_old_log_probabilities_training_is_the_same(run, keys, monkeypatch):
    """The pass is made at the first step of these three alone."""
    without = run(*keys)
    monkeypatch.setattr("dfactory.rl.source.CHECKED_EVERY", 1)
    with_pass = run(*keys)
    assert ["logprob_change_fresh" in row for row in without] == [True, False, False]
    assert all(row["logprob_change_fresh"] < 1e-6 for row in with_pass)
    for name in ("loss", "policy", "grad_norm", "token_nll", "clip_ratio"):
        assert [row[name] for row in without] == pytest.approx([row[name] for row in with_pass], rel=1e-6), name


@pytest.mark.parametrize("error, tolerance, holds", [(2e-4, 1e-4, False), (5e-5, 1e-4, True), (5e-2, 1e-1, True)])
def test_a_source_whose_old_log_probabilities_are_wrong(error, tolerance, holds):
    """By `error` everywhere; only the first window on the same rollouts is held to the tolerance."""
    source = make_source(num_iterations=2, ratio_tolerance=tolerance)
    right = source.score
    source.score = lambda batch: right(batch)._replace(logprob_N=right(batch).logprob_N + error)

    def measured() -> dict[str, float]:
        totals = [
            PolicyGradient()(batch, scores_of(batch)).metrics["logprob_change_fresh"] for batch in source.next_window()
        ]
        return {"logprob_change_fresh": float(sum(mean.total for mean in totals) / sum(mean.count for mean in totals))}

    def scores_of(batch) -> TokenScores:
        scores = right(batch)
        return scores._replace(hit_N=scores.hit_N > 0, argmax_N=torch.zeros_like(batch.target_ids_N))

    first = measured()
    if holds:
        source.check(first)
    else:
        with pytest.raises(RolloutError, match=r"logprob_change_fresh 0\.0002 at the first step on new rollouts"):
            source.check(first)
    measured()
    source.check({"logprob_change_fresh": 0.5})


def test_a_resumed_run_compares_at_the_same_steps():
    """Which steps those are is told by their numbers, not counted from the start of the process."""

    def compared(source, steps: int) -> list[bool]:
        return ["old_logprob_N" in source.next_window()[0].columns for _ in range(steps)]

    whole = make_source(knows_ratio_1=True)
    expected = compared(whole, 4)
    state = whole.state_dict()
    expected += compared(whole, 9)
    assert [step for step, is_compared in enumerate(expected) if is_compared] == [0, 10]
    resumed = make_source(knows_ratio_1=True)
    resumed.load_state_dict(state)
    assert compared(resumed, 9) == expected[4:]
