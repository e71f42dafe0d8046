"""SFT by hand, on four targets of one document with two views."""

import dataclasses

import numpy as np
import pytest
import torch

from dfactory.algorithms.sft import SFT
from dfactory.noise import RandomMask
from dfactory.packing import PackedDocument, align, collate
from dfactory.runs.sanity import watch_eos
from dfactory.types import Example, TokenScores, ViewBatch


def batch() -> ViewBatch:
    """One document with 4 response tokens and two views (a pair at t = 0.5 and 0.5): targets 0, 1 and 2, 3."""
    index = torch.arange(4)
    zeros = torch.zeros(1, 12, dtype=torch.long)
    return ViewBatch(
        input_ids_RS=zeros,
        position_ids_RS=zeros,
        document_RS=zeros,
        view_RS=torch.tensor([[0] * 4 + [1] * 4 + [2] * 4]),
        block_RS=zeros,
        trunk_RS=zeros,
        target_index_N=torch.tensor([4, 5, 10, 11]),
        left_index_N=torch.tensor([4, 5, 10, 11]),
        clean_left_index_N=torch.tensor([4, 5, 10, 11]),
        target_ids_N=index,
        real_N=torch.ones(4, dtype=torch.bool),
        t_N=torch.full((4,), 0.5),
        elbo_weight_N=torch.full((4,), 2.0),
        document_id_D=torch.tensor([17]),
        response_length_D=torch.tensor([4]),
        answer_length_D=torch.tensor([4]),
        num_views_D=torch.tensor([2]),
    )


SCORES = TokenScores(
    logprob_N=torch.tensor([-1.0, -2.0, -3.0, -4.0], requires_grad=True),
    entropy_N=torch.tensor([0.5, 0.5, 1.0, 1.0]),
    hit_N=torch.tensor([True, False, False, False]),
    argmax_N=torch.tensor([0, 9, 9, 9]),
    argmax_logprob_N=torch.tensor([-1.0, -0.5, -0.5, -0.5]),
)


def test_uniform():
    terms = SFT("uniform")(batch(), SCORES)
    assert terms.loss["nll"].total.item() == 10.0
    assert terms.loss["nll"].count == 4  # targets


def test_elbo_counts_response_tokens_once_a_view():
    terms = SFT("elbo")(batch(), SCORES)
    assert terms.loss["nll"].total.item() == 20.0  # each weighs 1 / 0.5
    assert terms.loss["nll"].count == 8  # 4 response tokens x 2 views


@pytest.mark.parametrize("weight", ["uniform", "elbo"])
def test_counts_are_known_before_the_forward(weight):
    objective = SFT(weight)
    assert objective.counts(batch()) == {"nll": objective(batch(), SCORES).loss["nll"].count}


def test_metrics_carry_no_gradient():
    metrics = SFT()(batch(), SCORES).metrics
    assert {name: (mean.total.item(), mean.count) for name, mean in metrics.items()} == {
        "token_nll": (10.0, 4),
        "hit_rate": (1, 4),
        "entropy": (3.0, 4),
    }
    assert not any(mean.total.requires_grad for mean in metrics.values())


@pytest.mark.parametrize("block_size", [1, 2, 4, 8, 16, 32])
def test_metrics_do_not_depend_on_the_fill(block_size):
    """A prompt of 3, an answer of 4 with EOS: a model that knows all of the fill and nothing of the answer has learnt
    nothing, in blocks of any size. The loss covers the fill all the same."""
    example = Example(1, np.array([7, 7, 7, 5, 6, 5, 0], np.int32), np.arange(7) >= 3)
    document = align(example, block_size, eos_id=0)
    views = RandomMask(9, seed=0, low=0.5, high=0.5, complementary=True)(document, 0)
    filled = collate([[PackedDocument(document, views)]], block_size)
    in_fill_N = filled.position_ids_RS.flatten()[filled.target_index_N] >= 7
    nothing_N = torch.zeros_like(in_fill_N)
    scores = TokenScores(
        torch.where(in_fill_N, -0.01, -2.0), torch.where(in_fill_N, 0.0, 1.5), in_fill_N, *[nothing_N] * 2
    )
    terms = SFT(editing_mask_id=9)(filled, scores)
    told = {name: float(mean.total / mean.count) for name, mean in terms.metrics.items() if mean.count}
    assert told == {
        "token_nll": 2.0, "hit_rate": 0.0, "entropy": 1.5, "token_nll_masked": 2.0, "hit_rate_masked": 0.0
    }  # fmt: skip
    assert "eos_hit_rate" in watch_eos(0, filled, scores)
    assert float(watch_eos(0, filled, scores)["eos_hit_rate"].total) == 0
    assert terms.loss["nll"].count == len(document.input_ids_T) - 3


def test_kinds_of_targets():
    """At targets 0, 1, 2, 3 stand the mask, a wrong token, the right token and the mask."""
    tokens = torch.zeros(1, 12, dtype=torch.long)
    tokens[0, batch().target_index_N] = torch.tensor([9, 5, 2, 9])
    edited = dataclasses.replace(batch(), input_ids_RS=tokens)
    metrics = SFT(editing_mask_id=9)(edited, SCORES).metrics
    by_kind = {name: (float(mean.total), int(mean.count)) for name, mean in metrics.items() if name.count("_") == 2}
    assert by_kind == {
        "token_nll_masked": (5.0, 2),
        "hit_rate_masked": (1.0, 2),
        "token_nll_edited": (2.0, 1),
        "hit_rate_edited": (0.0, 1),
        "token_nll_kept": (3.0, 1),
        "hit_rate_kept": (0.0, 1),
    }
