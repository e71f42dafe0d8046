"""Models to decode with: random tiny ones that look at their input, and a scripted one without weights."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dfactory.models.registry import load_policy
from dfactory.models.tiny import write_tiny_config

GOLDEN_DIR = Path(__file__).parents[1] / "golden"
MASK, EOS = 159, 156  # of the random models


def sharpen(policy, body: float = 4.0, head: float = 40.0):
    """The initial 0.02 makes a model that hardly looks at its input and is sure of nothing."""
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(head if "lm_head" in name else body)
    return policy


def same_rollouts(left, right):
    """Everything equal; log-probabilities up to the arithmetic of another batch shape."""
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.commit_logprob == pytest.approx(b.commit_logprob, abs=1e-4)
        assert dataclasses.replace(a, commit_logprob=[]) == dataclasses.replace(b, commit_logprob=[])


@pytest.fixture(scope="session")
def make_policy(tmp_path_factory):
    """A random fp32 LLaDA2-MoE; keyword arguments are keys of its config."""

    def make(head: float = 40.0, seed: int = 0, **keys):
        directory = write_tiny_config(tmp_path_factory.mktemp("model"), **keys)
        return sharpen(load_policy(directory, dtype="float32", init_weights="random", seed=seed), head=head)

    return make


@pytest.fixture(scope="session")
def policy(make_policy):
    return make_policy()


class Scripted:
    """A policy whose logits at a position are `script(position, pass)`, whatever stands around it.

    `pass` counts the forwards so far. Hidden states are the logits themselves.
    """

    device = torch.device("cpu")
    can_be_recorded = sees_whole_document = False
    logit_shift = 0

    def __init__(self, vocab_size: int, script: Callable[[int, int], list[float]]):
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.script = script
        self.seen: list[tuple[list[int], list[int]]] = []  # ids and positions of every forward

    def hidden_at(self, chosen_N, inputs_RS, position_ids_RS, visibility, cache):
        self.seen.append((inputs_RS.token[0].tolist(), position_ids_RS[0].tolist()))
        return torch.tensor([self.script(p, len(self.seen) - 1) for p in position_ids_RS[0, chosen_N].tolist()])

    def logits(self, hidden):
        return hidden


def log_odds(vocab_size: int, **probability_of: float) -> list[float]:
    """Logits with p(token n) as given by `t<n>=p`; the rest shares what is left."""
    given = {int(name[1:]): p for name, p in probability_of.items()}
    rest = (1 - sum(given.values())) / (vocab_size - len(given))
    return torch.tensor([given.get(token, rest) for token in range(vocab_size)]).log().tolist()
