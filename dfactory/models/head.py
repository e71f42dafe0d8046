"""The vocabulary head. It returns five numbers per target, TokenScores, and never logits.

With a vocabulary of 157,184 the logits of one packed sequence need more memory than the model. So they are computed in tiles
of bounded size, in the forward pass and again in the backward pass. Sums over the vocabulary are updated tile by tile, each
relative to the largest logit so far. No tensor of size [targets, V] outlives its tile. Tiles of one part of the vocabulary
are consecutive, so that its weights are read, and their gradient is written, once. The head owns its weight and reads it
inside its own forward, so that ZeRO-3 gathers it.

With z the logits, p = softmax(z), q = softmax(z / T) and H the entropy of q:

    d log p_y / dz = onehot(y) - p          d H / dz = -q * (log q + H) / T

A model may bound its logits: z = c tanh(s / c) of the scores s, with dz / ds = 1 - (z / c)^2.

Where the gradient of the loss by each log-probability is known before (`gradient_N`: the loss is linear in them), on a CPU
the forward makes the gradients of hidden states and weight as well, some targets at a time, and the backward computes no
logits again: three products of matrices instead of four. As Liger's fused linear cross-entropy does (arXiv:2410.10989).

The temperature T affects only the entropy (dParallel trains it at 0.5); all other scores use p.

Where a model has ranges of ids for other modalities (ranges.py), each target is scored among the ids of its own range alone:
the other logits of its row become ABSENT, whose exponential is 0 in every sum and in every gradient.
"""

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import nn

from dfactory.ranges import NO_RANGES, TokenRanges
from dfactory.types import TokenScores

CHUNK_BYTES = {
    "cpu": 8 * 2**20,
    "cuda": 512 * 2**20,
}  # fp32 logits of one tile; on a CPU they should fit into the cache
ONE_PASS_BYTES = {"cpu": 128 * 2**20}  # fp32 logits of the targets whose gradients are made at once
ONE_PASS_TILE = {"cpu": 8 * 2**20}  # of them, that are worked on at once
ABSENT = -1e32  # the logit of an id that a target cannot be; with -inf, 0 * ABSENT would be NaN
WIDTH = 2048  # minimum width of a tile; if the targets do not fit beside it, they are split too


def makes_gradients_ahead(device: torch.device) -> bool:
    """Whether the forward makes the gradients of a linear loss. On a CPU alone: the backward compares the gradient that
    comes with the one that was announced, for which the host would have to wait for a GPU in the middle of a step."""
    return device.type in ONE_PASS_BYTES


class VocabularyHead(nn.Linear):
    """`nn.Linear` over the vocabulary, with a second mode: given targets it returns TokenScores. With a `softcap` c its
    logits are c tanh(scores / c)."""

    softcap: float | None = None

    @staticmethod
    def adopt(head: nn.Linear, softcap: float | None = None) -> "VocabularyHead":
        """Add the second mode to an existing head; its parameters, names and ties stay."""
        head.__class__ = VocabularyHead
        head.softcap = softcap
        return head

    def forward(
        self,
        hidden: torch.Tensor,
        target_ids_N: torch.Tensor | None = None,
        entropy_temperature: float = 1.0,
        ranges: TokenRanges = NO_RANGES,
        averages: bool = False,
        expected: bool = False,
        gradient_N: torch.Tensor | None = None,
    ):
        """hidden [..., H] -> logits [..., V]; or hidden [N, H] with targets [N] -> TokenScores; or with `averages` logits
        [N, V] -> the mean of the rows of the weight under each softmax, [N, H]: with tied weights the expected embedding;
        or with `expected` hidden [N, H] -> the same mean. Its gradient goes to the rows alone, not to the softmax.
        `gradient_N` is the loss's by the log-probabilities, where it is known: the scores and gradients are the same."""
        if averages:
            return expected_rows(hidden, self.weight)
        if expected:
            return _ExpectedRows.apply(hidden, self.weight, self.softcap)
        if target_ids_N is None:
            scores = super().forward(hidden)
            return scores if self.softcap is None else _capped(scores.float(), self.softcap)  # the last step in fp32
        scores = _Scores
        plain = self.softcap is None and entropy_temperature == 1 and len(target_ids_N) > 0
        if plain and makes_gradients_ahead(hidden.device) and gradient_N is not None and torch.is_grad_enabled():
            scores = _ScoresInOnePass
        inputs = (hidden, self.weight, target_ids_N, entropy_temperature, self.softcap, ranges, gradient_N)
        return TokenScores(*scores.apply(*inputs))


def expected_rows(logits_NV: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
    """The mean of the rows of a weight under softmax(logits), [N, H]."""
    return logits_NV.softmax(dim=-1, dtype=torch.float32).to(weight_VH.dtype) @ weight_VH


class _ExpectedRows(torch.autograd.Function):
    """With p = softmax(z) a constant: d (p W) / d W = p. Backward computes p again, tile by tile."""

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, softcap):
        rows = max(1, CHUNK_BYTES[weight_VH.device.type] // (4 * len(weight_VH)))
        means, log_sums = [], []
        for part in hidden_NH.split(rows):
            logits = _logits(part, weight_VH, softcap)
            means.append(expected_rows(logits, weight_VH))
            log_sums.append(logits.logsumexp(dim=-1))
        ctx.softcap = softcap
        ctx.save_for_backward(hidden_NH, weight_VH, torch.cat(log_sums))
        return torch.cat(means)

    @staticmethod
    def backward(ctx, grad_mean_NH):
        hidden_NH, weight_VH, log_sum_N = ctx.saved_tensors
        grad_weight = torch.zeros_like(weight_VH)
        for tile, parts in _tiles(len(hidden_NH), weight_VH):
            grad_tile = 0  # in fp32, as in _Scores
            for part in parts:
                logits = _logits(hidden_NH[part], weight_VH[tile], ctx.softcap)
                p = logits.sub_(log_sum_N[part, None]).exp_().to(weight_VH.dtype)
                grad_tile = grad_tile + (p.T @ grad_mean_NH[part]).float()
            grad_weight[tile] = grad_tile
        return None, grad_weight, None


def _capped(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _logits(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """A tile, in fp32."""
    return _capped((hidden_NH @ weight_VH.T).float(), softcap)


def _tiles(targets: int, weight_VH: torch.Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Parts of the vocabulary, each with the parts of the targets that are computed against it in turn."""
    room = max(1, CHUNK_BYTES[weight_VH.device.type] // 4)
    vocabulary = len(weight_VH)
    width = min(vocabulary, room, max(WIDTH, room // max(1, targets)))
    rows = room // width
    parts = [slice(start, min(start + rows, targets)) for start in range(0, targets, rows)]
    for start in range(0, vocabulary, width):
        yield slice(start, min(start + width, vocabulary)), parts


def _place(target_ids_N: torch.Tensor, tile: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Which targets are in a part of the vocabulary, [N, 1], and in which of its columns, [N, 1]; 0 for the others."""
    inside_N1 = ((target_ids_N >= tile.start) & (target_ids_N < tile.stop))[:, None]
    return inside_N1, torch.where(inside_N1, target_ids_N[:, None] - tile.start, 0)


class _Sums:
    """Running sums over rows of logits z that arrive in tiles: the largest logit, the sum of exp(z - largest), and with
    x = (z - largest) / T the sums of exp(x) and x exp(x).

    When a tile raises the largest logit by d, the sums so far are scaled by exp(-d), and the weighted one is shifted first:
    sum (x - d/T) exp(x - d/T) = exp(-d/T) (sum x exp(x) - d/T sum exp(x)).
    """

    def __init__(self, hidden_NH: torch.Tensor, temperature: float):
        self.temperature = temperature
        numbers = (hidden_NH.new_zeros(len(hidden_NH), dtype=torch.float32) for _ in range(4))
        self.top_N, self.sum_N, self.tempered_N, self.weighted_N = numbers
        self.top_N.fill_(-1e30)  # below all logits; with -inf the first difference would be NaN
        self.argmax_N = torch.zeros(len(hidden_NH), dtype=torch.long, device=hidden_NH.device)

    def add(self, part: slice, tile: slice, logits: torch.Tensor) -> None:
        """Add the logits [rows of `part`, columns of `tile`]; they are overwritten."""
        here, argmax = logits.max(dim=-1)
        top = self.top_N[part]
        self.argmax_N[part] = torch.where(here > top, argmax + tile.start, self.argmax_N[part])
        new_top = torch.maximum(here, top)
        fall, below_top = top - new_top, logits.sub_(new_top[:, None])  # fall = -d
        self.top_N[part] = new_top
        weight = below_top.exp()
        if self.temperature != 1:
            self.sum_N[part] = fall.exp() * self.sum_N[part] + weight.sum(dim=-1)
            fall, below_top = fall / self.temperature, below_top.div_(self.temperature)
            torch.exp(below_top, out=weight)
        scale, tempered = fall.exp(), self.tempered_N[part]
        self.weighted_N[part] = scale * (self.weighted_N[part] + fall * tempered)
        self.tempered_N[part] = scale * tempered + weight.sum(dim=-1)
        self.weighted_N[part] += weight.mul_(below_top).sum(dim=-1)

    def logs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Logarithms of the sums of exp(z - largest) and of exp(x)."""
        log_tempered_N = self.tempered_N.log()
        return (log_tempered_N if self.temperature == 1 else self.sum_N.log()), log_tempered_N


def _remove_others(logits: torch.Tensor, target_ids: torch.Tensor, tile: slice, ranges: TokenRanges) -> None:
    """Make ABSENT the logits of a tile whose ids are not in the range of the row's target."""
    if ranges:
        logits.masked_fill_(ranges.others(ranges.group_of(target_ids), tile), ABSENT)


class _Totals(NamedTuple):
    """What sums over the vocabulary come to, of each target."""

    log_sum_N: torch.Tensor  # log sum exp(z)
    shift_N: torch.Tensor  # log q = (log p) / T - shift
    scores: TokenScores

    @staticmethod
    def of(sums: _Sums, target_logit_N: torch.Tensor, target_ids_N: torch.Tensor) -> "_Totals":
        log_sum_N, log_tempered_N = sums.logs()
        entropy_N = log_tempered_N - sums.weighted_N / sums.tempered_N
        shift_N = log_tempered_N - log_sum_N / sums.temperature
        argmax_logprob_N, log_sum_N = -log_sum_N, sums.top_N + log_sum_N
        hit_N = sums.argmax_N == target_ids_N
        scores = TokenScores(target_logit_N - log_sum_N, entropy_N, hit_N, sums.argmax_N, argmax_logprob_N)
        return _Totals(log_sum_N, shift_N, scores)


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, target_ids_N, temperature, softcap, ranges, gradient_N):
        sums = _Sums(hidden_NH, temperature)
        target_logit_N = torch.zeros_like(sums.top_N)
        for tile, parts in _tiles(len(target_ids_N), weight_VH):
            for part in parts:
                logits = _logits(hidden_NH[part], weight_VH[tile], softcap)
                _remove_others(logits, target_ids_N[part], tile, ranges)
                inside, column = _place(target_ids_N[part], tile)
                target_logit_N[part] += (logits.gather(1, column) * inside)[:, 0]
                sums.add(part, tile, logits)
        totals = _Totals.of(sums, target_logit_N, target_ids_N)
        return _kept(ctx, (hidden_NH, weight_VH, target_ids_N), totals, (temperature, softcap, ranges))

    @staticmethod
    def backward(ctx, grad_logprob_N, grad_entropy_N, *_):
        hidden_NH, weight_VH, target_ids_N, *_ = ctx.saved_tensors
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        if grad_logprob_N is None:
            grad_logprob_N = torch.zeros_like(grad_entropy_N)
        # Tiles are summed in fp32: a sum of rounded bf16 parts would depend on the size of the tiles.
        grad_hidden = torch.zeros_like(hidden_NH, dtype=torch.float32) if needs_hidden else None
        make = torch.empty_like if len(target_ids_N) else torch.zeros_like  # without targets nothing is written
        grad_weight = make(weight_VH) if needs_weight else None
        for tile, parts in _tiles(len(target_ids_N), weight_VH):
            grad_tile = 0
            for part in parts:
                grad_logits = _grad_logits(ctx, tile, part, grad_logprob_N, grad_entropy_N).to(weight_VH.dtype)
                if needs_hidden:
                    _add_product(grad_hidden[part], grad_logits, weight_VH[tile])
                if needs_weight and len(parts) == 1:
                    torch.mm(grad_logits.T, hidden_NH[part], out=grad_weight[tile])
                elif needs_weight:
                    grad_tile = grad_tile + (grad_logits.T @ hidden_NH[part]).float()
            if needs_weight and len(parts) > 1:
                grad_weight[tile] = grad_tile
        return None if grad_hidden is None else grad_hidden.to(hidden_NH.dtype), grad_weight, *[None] * 5


def _kept(ctx, inputs: tuple[torch.Tensor, ...], totals: _Totals, options: tuple) -> TokenScores:
    """The outputs of a forward, after everything is saved from which a backward computes logits again."""
    ctx.temperature, ctx.softcap, ctx.ranges = options
    ctx.save_for_backward(*inputs, totals.log_sum_N, totals.shift_N, totals.scores.entropy_N)
    ctx.mark_non_differentiable(*totals.scores[2:])
    ctx.set_materialize_grads(False)  # an unused entropy has the gradient None, known without reading the device
    return totals.scores


class _ScoresInOnePass(torch.autograd.Function):
    """The same scores. The forward makes the gradients for the upstream gradient `gradient_N`; the backward hands them out
    if it is the one that comes, and else computes them as _Scores does."""

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, target_ids_N, temperature, softcap, ranges, gradient_N):
        targets, device = len(target_ids_N), weight_VH.device.type
        rows = min(targets, max(1, ONE_PASS_BYTES[device] // (4 * len(weight_VH))))
        parts = [slice(start, min(start + rows, targets)) for start in range(0, targets, rows)]
        made = _Gradients(hidden_NH, weight_VH, ctx.needs_input_grad, len(parts))
        logits = torch.empty(rows * len(weight_VH), dtype=torch.float32, device=hidden_NH.device)
        found = []
        for part in parts:
            tiles = _tiles_of(logits, part.stop - part.start, weight_VH)
            totals = _logits_and_totals(tiles, hidden_NH[part], weight_VH, target_ids_N[part], ranges)
            made.add(part, tiles, totals.log_sum_N, target_ids_N[part], gradient_N[part])
            found.append(totals)
        totals = found[0] if len(found) == 1 else _joined(found)
        ctx.made, ctx.gradient_N = made.results(), gradient_N
        return _kept(ctx, (hidden_NH, weight_VH, target_ids_N), totals, (temperature, softcap, ranges))

    @staticmethod
    def backward(ctx, grad_logprob_N, grad_entropy_N, *_):
        made, ctx.made = ctx.made, None  # not kept, so that a parameter can take its gradient without a copy
        expected = grad_entropy_N is None and grad_logprob_N is not None
        if made is None or not expected or not torch.equal(grad_logprob_N, ctx.gradient_N):
            return _Scores.backward(ctx, grad_logprob_N, grad_entropy_N)
        return *made, *[None] * 5


_Tiles: TypeAlias = list[tuple[slice, torch.Tensor]]
"""Parts of the vocabulary, each with room for the logits of some targets."""


def _tiles_of(logits: torch.Tensor, rows: int, weight_VH: torch.Tensor) -> _Tiles:
    """The room of a flat tensor, shared out so that each tile is contiguous."""
    vocabulary = len(weight_VH)
    width = max(WIDTH, ONE_PASS_TILE[weight_VH.device.type] // (4 * rows))
    columns = [slice(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]
    return [(tile, logits[rows * tile.start : rows * tile.stop].view(rows, -1)) for tile in columns]


def _logits_and_totals(tiles: _Tiles, hidden_NH, weight_VH, target_ids_N, ranges: TokenRanges) -> _Totals:
    """Write the logits of some targets, and return what their sums come to."""
    sums = _Sums(hidden_NH, 1.0)
    target_logit_N = torch.zeros_like(sums.top_N)
    everyone = slice(0, len(target_ids_N))
    for tile, logits in tiles:
        if weight_VH.dtype == logits.dtype:
            torch.mm(hidden_NH, weight_VH[tile].T, out=logits)
        else:
            logits.copy_(hidden_NH @ weight_VH[tile].T)
        _remove_others(logits, target_ids_N, tile, ranges)
        inside, column = _place(target_ids_N, tile)
        target_logit_N += (logits.gather(1, column) * inside)[:, 0]
        sums.add(everyone, tile, logits.clone())
    return _Totals.of(sums, target_logit_N, target_ids_N)


class _Gradients:
    """Gradients of hidden states and weight, to which the targets add theirs part by part. Sums of parts are in fp32."""

    def __init__(self, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, needs: tuple[bool, ...], num_parts: int):
        self.hidden_NH, self.weight_VH, self.num_parts = hidden_NH, weight_VH, num_parts
        needs_hidden, needs_weight, *_ = needs
        self.grad_hidden = torch.zeros_like(hidden_NH, dtype=torch.float32) if needs_hidden else None
        make = torch.empty_like if num_parts == 1 else torch.zeros_like
        dtype = weight_VH.dtype if num_parts == 1 else torch.float32
        self.grad_weight = make(weight_VH, dtype=dtype) if needs_weight else None

    def add(self, part: slice, tiles: _Tiles, log_sum_N, target_ids_N, gradient_N) -> None:
        """Those of some targets, whose logits are overwritten."""
        upstream = gradient_N[:, None]
        for tile, logits in tiles:
            grad_logits = logits.sub_(log_sum_N[:, None]).exp_().mul_(-upstream)
            inside, column = _place(target_ids_N, tile)
            grad_logits = grad_logits.scatter_add_(1, column, upstream * inside).to(self.weight_VH.dtype)
            if self.grad_hidden is not None:
                _add_product(self.grad_hidden[part], grad_logits, self.weight_VH[tile])
            if self.grad_weight is not None and self.num_parts == 1:
                torch.mm(grad_logits.T, self.hidden_NH[part], out=self.grad_weight[tile])
            elif self.grad_weight is not None:
                _add_product(self.grad_weight[tile], grad_logits.T, self.hidden_NH[part])

    def results(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """In the precisions of hidden states and weight."""
        pairs = (self.grad_hidden, self.hidden_NH), (self.grad_weight, self.weight_VH)
        return tuple(None if gradient is None else gradient.to(like.dtype) for gradient, like in pairs)


def _joined(parts: list[_Totals]) -> _Totals:
    """Of all targets, from some of them each."""
    scores = TokenScores(*(torch.cat(column) for column in zip(*(part.scores for part in parts), strict=True)))
    return _Totals(torch.cat([p.log_sum_N for p in parts]), torch.cat([p.shift_N for p in parts]), scores)


def _grad_logits(ctx, tile: slice, part: slice, grad_logprob_N, grad_entropy_N) -> torch.Tensor:
    """The gradient of the loss with respect to a tile's scores, fp32: the two formulas above, times the upstream
    gradients."""
    hidden_NH, weight_VH, target_ids_N, log_sum_N, shift_N, entropy_N = ctx.saved_tensors
    logits = _logits(hidden_NH[part], weight_VH[tile], ctx.softcap)
    slope_of_cap = None if ctx.softcap is None else 1 - (logits / ctx.softcap) ** 2
    _remove_others(logits, target_ids_N[part], tile, ctx.ranges)
    log_p = logits.sub_(log_sum_N[part, None])
    upstream = grad_logprob_N[part, None]
    p = log_p.exp_() if grad_entropy_N is None else log_p.exp()
    grad_logits = p.mul_(-upstream)
    inside, column = _place(target_ids_N[part], tile)
    grad_logits.scatter_add_(1, column, upstream * inside)
    if grad_entropy_N is not None:
        log_q = log_p.div_(ctx.temperature).sub_(shift_N[part, None])
        slope = log_q.exp().mul_(log_q.add_(entropy_N[part, None]))
        grad_logits.sub_(slope.mul_(grad_entropy_N[part, None] / ctx.temperature))
    return grad_logits if slope_of_cap is None else grad_logits.mul_(slope_of_cap)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, for a total in fp32."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
