"""examples/: each runs, computes what the house computes, and stays short enough to be read in one sitting."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch

from dfactory.algorithms.policy_gradient import PolicyGradient
from dfactory.algorithms.sft import SFT
from dfactory.decoding import decode
from dfactory.models.registry import load_policy
from dfactory.noise import RandomMask
from dfactory.vocabulary import read_vocabulary
from examples import minimal_grpo, minimal_sft

EXAMPLES = Path(minimal_sft.__file__).parent


@pytest.fixture(scope="module")
def vocabulary():
    return read_vocabulary("tiny", mask_token_id=None, eos_token_id=None)


@pytest.fixture(scope="module")
def policy():
    return load_policy("tiny", dtype="float32")


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("minimal_*.py")), ids=lambda file: file.stem)
def test_an_example_is_read_in_one_sitting(file):
    assert len(file.read_text().splitlines()) < 200


def test_sft_runs_and_what_it_saves_can_be_rolled_out(tmp_path, capsys):
    """Two steps of each, as a user would call them one after the other."""
    saved = tmp_path / "sft"
    assert minimal_sft.main(["--steps", "2", "--batch-size", "2", "--questions", "4", "--output", str(saved)]) == 0
    shown = capsys.readouterr().out
    assert "step 2  loss " in shown
    assert "4 held-out prompts: 0.0% exact" in shown
    assert json.loads((saved / "config.json").read_text())["vocab_size"] == 2048
    options = ["--steps", "2", "--prompts", "2", "--group-size", "2"]
    assert minimal_grpo.main(["--model", str(saved), *options]) == 0
    assert "step 2  reward 0.000  rollouts with a signal 0" in capsys.readouterr().out


def test_the_loss_of_sft_is_that_of_the_objective(policy, vocabulary):
    examples = minimal_sft.read(minimal_sft.TRAIN, vocabulary)
    views = RandomMask(vocabulary.special.mask, seed=1, low=0.3, high=0.9, complementary=True)
    batch = minimal_sft.make_batch([examples[n] for n in range(3)], 0, views, vocabulary.special.eos)
    with torch.no_grad():
        nll = SFT("uniform")(batch, policy(batch)).loss["nll"]
        torch.testing.assert_close(minimal_sft.loss_of(policy, batch), nll.total / nll.count)


def test_the_loss_of_grpo_is_that_of_the_objective(policy, vocabulary):
    """On decoded rollouts, with ratios on both sides of the clip."""
    prompts = [ids for ids, _ in random.Random(0).sample(minimal_grpo.read_prompts(vocabulary), 3)]
    rollouts = decode(policy, prompts, vocabulary.rules(minimal_grpo.RULES))
    batch = minimal_grpo.make_batch(rollouts, vocabulary.special.mask)
    with torch.no_grad():
        logprob_N = policy(batch).logprob_N
        recorded = torch.tensor([sum(rollout.commit_logprob) for rollout in rollouts])
        torch.testing.assert_close(batch.sum_by_document(logprob_N), recorded, atol=1e-3, rtol=1e-4)

        advantage_D = torch.tensor([1.0, -0.5, 0.3])
        old_N = logprob_N + 0.4 * torch.randn(batch.num_targets, generator=torch.Generator().manual_seed(2))
        columns = {
            "advantage_D": advantage_D,
            "rollout_D": torch.arange(3),
            "share_D": torch.ones(3),
            "old_logprob_N": old_N,
        }
        # rl/rows.py takes what follows EOS out of the targets; here it gets weight 0
        weighted = dataclasses.replace(batch.with_columns(**columns), elbo_weight_N=batch.elbo_weight_N * batch.real_N)
        terms = PolicyGradient(level="token", aggregation="grpo")(weighted, policy(weighted))
        policy_term = terms.loss["policy"]
        ours = minimal_grpo.loss_of(policy, batch, old_N, advantage_D)
        torch.testing.assert_close(ours, policy_term.total / policy_term.count)
