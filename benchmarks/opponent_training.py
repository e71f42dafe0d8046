"""The opponent's training: rows of noisy ++ clean in micro-batches of similar length, fused AdamW.

Every view of a document is a row of its own. Rows are sorted by length and cut into micro-batches, so that little is padded;
gradients are summed over them, divided once by the number of targets.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from benchmarks.opponent import Peer, TargetLoss, target_nll, training_attention
from dfactory.recipe import Recipe

POSITIONS = 16384  # of a micro-batch, noisy and clean
PADDED = 0.1  # share of a micro-batch's positions that may be padding


class NoisyRow(NamedTuple):
    """One view of one document. L: its length in whole blocks."""

    clean_L: torch.Tensor
    noisy_L: torch.Tensor
    target_L: torch.Tensor  # bool
    factor_L: torch.Tensor  # of -log p in the loss, 0 where there is no target


class RowBatch(NamedTuple):
    """Rows of similar length, padded to the longest with the last token's id."""

    ids_RS: torch.Tensor  # noisy ++ clean
    position_RS: torch.Tensor
    where_N: torch.Tensor  # targets in the flattened rows
    target_N: torch.Tensor
    factor_N: torch.Tensor


def micro_batches(rows: Sequence[NoisyRow]) -> Iterator[list[int]]:
    """Which rows are computed together: from long to short, as many as POSITIONS and PADDED allow."""
    batch, real = [], 0
    for number in sorted(range(len(rows)), key=lambda i: -len(rows[i].clean_L)):
        length = len(rows[number].clean_L)
        padded = (len(rows[batch[0]].clean_L) if batch else length) * (len(batch) + 1)
        if batch and (2 * padded > POSITIONS or padded - real - length > PADDED * padded):
            yield batch
            batch, real = [], 0
        batch.append(number)
        real += length
    yield batch


def joined(rows: list[NoisyRow], device: torch.device) -> RowBatch:
    """noisy ++ clean, padded on the right of both halves."""
    longest = len(rows[0].clean_L)

    def padded(name: str) -> torch.Tensor:
        return nn.utils.rnn.pad_sequence([getattr(row, name) for row in rows], batch_first=True).to(device)

    clean_RL, target_RL = padded("clean_L"), padded("target_L")
    position_RS = torch.arange(longest, device=device).repeat(2).expand(len(rows), -1)
    row_N, column_N = target_RL.nonzero(as_tuple=True)
    return RowBatch(
        torch.cat([padded("noisy_L"), clean_RL], dim=1),
        position_RS,
        row_N * 2 * longest + column_N,
        clean_RL[target_RL],
        padded("factor_L")[target_RL],
    )


class Trained(NamedTuple):
    """Of all targets, before the step."""

    loss: float  # the sum of factor * -log p
    nll: float  # the sum of -log p


class PeerTraining:
    """Forward, backward, clipping and AdamW. In bfloat16 AdamW has float32 copies of the weights, as in DeepSpeed."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.peer = recipe, Peer(recipe.model_name_or_path, getattr(torch, recipe.dtype))
        self.parameters = self.peer.parameters
        self.masters = self.parameters
        if self.peer.dtype != torch.float32:
            self.masters = [nn.Parameter(parameter.detach().float()) for parameter in self.parameters]
        keys = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay, "fused": True}
        self.optimiser = torch.optim.AdamW(self.masters, **keys)

    def hidden(self, batch: RowBatch) -> torch.Tensor:
        """Of the targets, [N, H]."""
        length = batch.ids_RS.shape[1] // 2
        attend = training_attention(length, self.recipe.block_size, batch.ids_RS.device)
        hidden_RSH = self.peer.hidden(batch.ids_RS, batch.position_RS, attend)
        return self.peer.normed(hidden_RSH.flatten(0, 1)[batch.where_N])

    def train(self, rows: Sequence[NoisyRow]) -> Trained:
        """One step on all rows."""
        losses = []
        for some in micro_batches(rows):
            batch = joined([rows[i] for i in some], self.peer.device)
            loss, nll = TargetLoss.apply(self.hidden(batch), self.peer.head, batch.target_N, batch.factor_N)
            loss.backward()
            losses.append((loss.item(), nll.item()))
        self._update()
        return Trained(*map(sum, zip(*losses, strict=True)))

    @torch.no_grad()
    def sums(self, rows: Sequence[NoisyRow]) -> torch.Tensor:
        """The sum of factor * -log p of each row, without gradients."""
        sums_R = torch.zeros(len(rows), device=self.peer.device)
        for some in micro_batches(rows):
            batch = joined([rows[i] for i in some], self.peer.device)
            nll_N = target_nll(self.hidden(batch), self.peer.head, batch.target_N)
            row_N = torch.tensor(some, device=nll_N.device)[batch.where_N // batch.ids_RS.shape[1]]
            sums_R.index_add_(0, row_N, batch.factor_N * nll_N)
        return sums_R

    def _update(self) -> None:
        if self.masters is not self.parameters:
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                master.grad, parameter.grad = parameter.grad.float(), None
        if self.recipe.max_grad_norm:
            nn.utils.clip_grad_norm_(self.masters, self.recipe.max_grad_norm)
        self.optimiser.step()
        self.optimiser.zero_grad()
        if self.masters is not self.parameters:
            torch._foreach_copy_([p.data for p in self.parameters], [m.data for m in self.masters])
