"""From the hidden states of a forward to an Outcome for each response: the head, the draws and the rules.

Numbers leave the device once a group of responses that decide alike: the proposal of each open position and the columns
that the group's rule reads.

Letters: R responses, B block size, N open positions, V vocabulary, H hidden.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from dfactory.decoding.distribution import Distribution
from dfactory.decoding.response import Outcome, Response
from dfactory.decoding.rules.base import CHANCE, Forward, Proposal

LOGITS_BYTES = 128 * 2**20  # float32 logits of one chunk of open positions
PROPOSAL_TYPES = (torch.long, torch.float, torch.long, torch.float)


class Head(Protocol):
    """What is needed of a policy once its hidden states are there."""

    config: object  # with `vocab_size`

    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


def decide(
    policy: Head, responses: Sequence[Response], hidden_NH: torch.Tensor, open_RB: np.ndarray
) -> list[tuple[Response, Outcome]]:
    """What becomes of the block of each response, given hidden states of its open positions, row by row: [N, H], or
    [N, 2, H] with those of a forward without the prompt. Responses whose rules decide alike are decided together, and come
    one after another."""
    alike = defaultdict(list)
    for row, response in enumerate(responses):
        alike[response.rules.deciding].append(row)
    hidden_R = hidden_NH.split(open_RB.sum(axis=1).tolist())
    outcomes = []
    for rows in alike.values():
        group, hidden = [responses[row] for row in rows], torch.cat([hidden_R[row] for row in rows])
        outcomes += zip(group, _decide_alike(policy, group, hidden, torch.from_numpy(open_RB[rows])), strict=True)
    return outcomes


def decide_leads(
    policy: Head, responses: Sequence[Response], hidden_RH: torch.Tensor
) -> list[tuple[Response, int, float]]:
    """The first token of the block of each response and its log-probability, given the hidden state that predicts it. The
    mask is never drawn: a lead is not masked again."""
    alike = defaultdict(list)
    for row, response in enumerate(responses):
        alike[response.rules.deciding, response.rules.mask_token_id].append(row)
    leads = []
    for (_, mask), rows in alike.items():
        group = [responses[row] for row in rows]
        plain = group[0].rules.distribution
        without_mask = dataclasses.replace(plain, suppressed_ids=(*plain.suppressed_ids, mask))
        drawn_2R = _read_first(policy, group, hidden_RH[rows], plain)
        masks_R = drawn_2R[0] == mask
        if masks_R.any():  # drawn again; the others keep the log-probability that a learner computes
            again = [response for response, is_mask in zip(group, masks_R.tolist(), strict=True) if is_mask]
            drawn_2R[:, masks_R] = _read_first(policy, again, hidden_RH[rows][masks_R], without_mask)
        leads += zip(group, drawn_2R[0].long().tolist(), drawn_2R[1].tolist(), strict=True)
    return leads


def _read_first(
    policy: Head, responses: Sequence[Response], hidden_RH: torch.Tensor, distribution: Distribution
) -> torch.Tensor:
    """Tokens of the first position of each response's block and their log-probabilities, [2, R]."""
    first_RB = torch.zeros(len(responses), responses[0].rules.block_size, dtype=torch.bool)
    first_RB[:, 0] = True
    return _read(policy, responses, hidden_RH, first_RB, distribution)[:2]


def _decide_alike(
    policy: Head, responses: Sequence[Response], hidden_NH: torch.Tensor, open_RB: torch.Tensor
) -> list[Outcome]:
    rules = responses[0].rules
    masked_RB = torch.from_numpy(np.stack([response.due_B for response in responses]))
    read = _read(policy, responses, hidden_NH, open_RB, rules.distribution)
    spread_RB = _spread(read, open_RB)
    proposal_RB = Proposal(*(n_RB.to(t) for n_RB, t in zip(spread_RB[:4], PROPOSAL_TYPES, strict=True)))
    columns = {column.name: n_RB.float() for column, n_RB in zip(rules.columns, spread_RB[4:], strict=True)}
    if rules.reads_chance:
        columns[CHANCE.name] = torch.from_numpy(np.stack([response.chance_B() for response in responses]))
    decision = rules.decide(
        Forward(
            proposal_RB=proposal_RB,
            tokens_RB=torch.from_numpy(np.stack([response.tokens_B for response in responses])),
            masked_RB=masked_RB,
            editable_RB=open_RB & ~masked_RB,
            step_R=torch.tensor([response.mask_steps for response in responses]),
            columns=columns,
            memory=_remembered(responses, masked_RB.shape[1]),
        )
    )
    chosen = (decision.commit_RB, decision.edit_RB, decision.remask_RB)
    rows = zip(*(field.numpy() for field in (proposal_RB.token, proposal_RB.logprob, *chosen)), strict=True)
    memory = decision.memory
    return [Outcome(*row, {name: values[r] for name, values in memory.items()}) for r, row in enumerate(rows)]


def _spread(numbers_N: torch.Tensor, open_RB: torch.Tensor) -> torch.Tensor:
    """Rows of numbers of the open positions at their places, [rows, R, B]; 0 elsewhere."""
    spread_RB = numbers_N.new_zeros(len(numbers_N), *open_RB.shape)
    spread_RB[:, open_RB] = numbers_N
    return spread_RB


def _remembered(responses: Sequence[Response], block_size: int) -> dict[str, torch.Tensor]:
    """What the rule remembers of each block, [R, B]; NaN in rows that are at their first forward."""
    nothing_B = torch.full((block_size,), torch.nan)
    names = dict.fromkeys(name for response in responses for name in response.memory)
    return {name: torch.stack([r.memory.get(name, nothing_B).float() for r in responses]) for name in names}


def _read(
    policy: Head,
    responses: Sequence[Response],
    hidden_NH: torch.Tensor,
    open_RB: torch.Tensor,
    distribution: Distribution,
) -> torch.Tensor:
    """Proposals and columns of N positions: float64 [4 + columns, N] on the host, the one transfer."""
    rules, device = responses[0].rules, hidden_NH.device
    uniform_N, last_NV, early_N = None, None, None
    if not distribution.is_greedy:
        uniform_N = torch.from_numpy(np.stack([response.uniform_B() for response in responses]))[open_RB]
    if rules.compares:
        last_NV = _last_logprobs(responses, policy.config.vocab_size, device)[open_RB.to(device)]
    group_N = None
    if rules.ranges:
        group_N = torch.from_numpy(np.stack([response.group_B for response in responses]))[open_RB]
    early_RB = np.stack([response.early_B for response in responses])
    if early_RB.any():
        early_N = torch.from_numpy(early_RB)[open_RB]
    rows = max(1, LOGITS_BYTES // (4 * policy.config.vocab_size))
    parts, logprobs = [], []
    for start in range(0, len(hidden_NH), rows):
        part = slice(start, start + rows)
        uniform, last, early, group = (
            None if of_N is None else of_N[part].to(device) for of_N in (uniform_N, last_NV, early_N, group_N)
        )
        logits_NV = policy.logits(hidden_NH[part])
        if logits_NV.dim() == 3:
            logits_NV = distribution.guided(logits_NV)
        if group is not None:
            others = rules.ranges.others(group, slice(0, logits_NV.shape[-1]))
            logits_NV = logits_NV.masked_fill(others, -torch.inf)
        numbers, logprob_NV = distribution.read(logits_NV, uniform, rules.columns, last, early)
        parts.append(torch.stack([of_N.double() for of_N in numbers]))
        logprobs.append(logprob_NV)
    if rules.compares:
        _keep_logprobs(responses, torch.cat(logprobs), open_RB.to(device))
    return torch.cat(parts, dim=1).cpu()


def _last_logprobs(responses: Sequence[Response], vocab_size: int, device: torch.device) -> torch.Tensor:
    """[R, B, V], NaN where a block had no forward before."""
    block_size = responses[0].rules.block_size
    nothing_BV = torch.full((block_size, vocab_size), torch.nan, device=device)
    kept = (response.last_logprob_BV for response in responses)
    return torch.stack([nothing_BV if last_BV is None else last_BV for last_BV in kept])


def _keep_logprobs(responses: Sequence[Response], logprob_NV: torch.Tensor, open_RB: torch.Tensor) -> None:
    kept_RBV = logprob_NV.new_full((*open_RB.shape, logprob_NV.shape[1]), torch.nan)
    kept_RBV[open_RB] = logprob_NV
    for response, kept_BV in zip(responses, kept_RBV, strict=True):
        response.last_logprob_BV = kept_BV
