"""The schedule of times on blocks that a person can check."""

import pytest
import torch

from dfactory.decoding.rules.base import CHANCE, CONFIDENCE, ENTROPY, MARGIN, Forward
from dfactory.decoding.rules.timed import Timed
from tests.decoding.test_rules import forward_of, yes


def counts(rule: Timed, masks: int) -> list[int]:
    """What the forwards of a block commit; the decoder gives the last one what is left, because the rule may wait."""
    found = []
    for step in range(rule.time_steps - 1):
        left = masks - sum(found)
        masked_RB = torch.arange(masks)[None] < left
        score = {column: [[0.5] * masks] for column in rule.reads}
        found.append(int(rule.commit(forward_of(masked_RB, [step], score)).sum()))
    return [*found, masks - sum(found)]


@pytest.mark.parametrize(
    "masks, steps, expected",
    [(5, 5, [0, 1, 1, 1, 2]), (8, 2, [3, 5]), (3, 1, [3]), (2, 4, [0, 0, 0, 2]), (16, 16, [0, *[1] * 14, 2])],
)
def test_counts_of_the_forwards(masks, steps, expected):
    """As many steps as masks waste the first forward, because its time ends a little above the even share."""
    assert counts(Timed(time_steps=steps), masks) == expected


@pytest.mark.parametrize(
    "order, expected", [("confidence", (0, 0, 1, 0)), ("margin", (0, 1, 0, 0)), ("entropy", (1, 0, 0, 0))]
)
def test_the_best_come_first(order, expected):
    columns = {CONFIDENCE: [[0.5, 0.6, 0.9, 0.99]], MARGIN: [[0.1, 0.8, 0.2, 0.99]], ENTROPY: [[0.1, 0.4, 0.9, 0.0]]}
    masked_RB = yes(1, 1, 1, 0)
    forward: Forward = forward_of(masked_RB, [1], columns)
    assert torch.equal(Timed(time_steps=3, time_order=order).commit(forward), yes(*expected))


def test_it_computes_the_column_of_its_order_alone():
    assert Timed.reads == (CONFIDENCE, ENTROPY, MARGIN, CHANCE)
    assert Timed(time_order="margin").reads == (MARGIN,)


def test_forwards_without_masks_and_beyond_the_last_commit_nothing_more():
    """Editing goes on after the schedule has ended."""
    assert not Timed(time_steps=2).commit(forward_of(yes(0, 0), [2], {CONFIDENCE: [[0.5, 0.5]]})).any()


def test_random_masks_move_with_the_chance_of_the_step():
    forward = forward_of(yes(1, 1, 0, 1), [2], {CHANCE: [[0.10, 0.4, 0.1, 0.33]]})
    assert torch.equal(Timed(time_steps=5, time_order="random").commit(forward), yes(1, 0, 0, 1))  # 1 - 0.4 / 0.6
