"""The opponent's decoding: a block cache with one extra forward a block, one prompt or a batch of them.

As SDAR's and Fast-dLLM's samplers do it. The prompt's whole blocks are computed once; equal prompts share that. Then each
block is denoised by forwards over its own tokens, against the cache, with the head at its masks only; a last forward over
the finished block writes its keys and values. Prompts are sorted by length and decoded in batches: each is padded on the
left to the longest in whole blocks, so that all begin their responses in one column, and a batch ends with its last one.

Letters as in opponent.py; B tokens a block, and the masks of a forward are M.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from benchmarks.opponent import Peer, PeerCache, masked


class PeerRules(NamedTuple):
    """The threshold rule: commit all above `threshold`, else the `min_commit` surest, of each row."""

    block_size: int
    max_new_tokens: int
    mask_token_id: int
    eos_token_id: int
    threshold: float
    min_commit: int
    suppressed_ids: tuple[int, ...]
    temperature: float = 0.0  # 0: the most probable token, else 1


class PeerAnswer(NamedTuple):
    token_ids: list[int]  # to the end of the last block
    commit_step: list[int]  # of each token, the number of the forward of its response


def decode_in_batches(peer: Peer, prompts: Sequence[list[int]], rules: PeerRules, rows: int) -> list[PeerAnswer]:
    """In the order of the prompts; batches of `rows` prompts of similar length."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, PeerAnswer] = {}
    for start in range(0, len(order), rows):
        some = order[start : start + rows]
        found = _Batch(peer, [prompts[i] for i in some], rules).decode()
        answers |= zip(some, found, strict=True)
    return [answers[i] for i in range(len(prompts))]


class _Batch:
    """One batch of prompts, padded on the left."""

    def __init__(self, peer: Peer, prompts: list[list[int]], rules: PeerRules):
        self.peer, self.prompts, self.rules = peer, prompts, rules
        self.size = rules.block_size
        whole = torch.tensor([len(prompt) // self.size * self.size for prompt in prompts])
        self.begin = int(whole.max())  # the column of the first block of all responses
        self.padding_R = (self.begin - whole).to(peer.device)
        blocks = [-(-(len(p) % self.size + rules.max_new_tokens) // self.size) for p in prompts]
        self.end_R = self.size * torch.tensor(blocks, device=peer.device)  # columns of a prompt's tail and its response
        columns = self.begin + self.size * max(blocks)
        self.ids_RS = torch.full((len(prompts), columns), rules.mask_token_id)
        for row, prompt in enumerate(prompts):
            left = self.begin - int(whole[row])
            self.ids_RS[row, :left] = 0
            self.ids_RS[row, left : left + len(prompt)] = torch.tensor(prompt)
        self.ids_RS = self.ids_RS.to(peer.device)
        self.step_RS = torch.full_like(self.ids_RS, -1)
        self.forwards_R = torch.zeros(len(prompts), dtype=torch.long, device=peer.device)

    @torch.inference_mode()
    def decode(self) -> list[PeerAnswer]:
        self.cache = self._prefilled()
        open_R = torch.ones(len(self.prompts), dtype=torch.bool, device=self.peer.device)
        for start in range(self.begin, self.ids_RS.shape[1], self.size):
            block = slice(start, start + self.size)
            open_R &= start - self.begin < self.end_R
            self._denoise(block, open_R)
            open_R &= ~self._ended(block)
            self.end_R = torch.where(open_R, self.end_R, self.end_R.clamp(max=block.stop - self.begin))
            if not open_R.any():
                break
            if block.stop < self.ids_RS.shape[1]:
                self._forward(block)  # of the finished block: its keys and values stay
                self.cache.start = block.stop
        return [self._answer(row) for row in range(len(self.prompts))]

    def _prefilled(self) -> PeerCache:
        """The cache of the prompts' whole blocks; equal prompts are computed once."""
        first = {tuple(prompt): row for row, prompt in reversed(list(enumerate(self.prompts)))}
        rows = sorted(first.values())
        cache = PeerCache(self.peer, len(rows), self.ids_RS.shape[1])
        if self.begin:
            block_S = torch.arange(self.begin, device=self.peer.device) // self.size
            padding_R1 = self.padding_R[rows, None]
            seen_RSS = block_S[:, None] >= block_S[None]
            seen_RSS = seen_RSS & (torch.arange(self.begin, device=self.peer.device) >= padding_R1)[:, None]
            seen_RSS |= torch.eye(self.begin, dtype=torch.bool, device=self.peer.device)  # padding sees itself
            position_RS = (torch.arange(self.begin, device=self.peer.device) - padding_R1).clamp(min=0)
            self.peer.hidden(self.ids_RS[rows, : self.begin], position_RS, masked(seen_RSS[:, None]), cache)
            cache.start = self.begin
        if len(rows) < len(self.prompts):
            places = [rows.index(first[tuple(prompt)]) for prompt in self.prompts]
            cache.repeat(torch.tensor(places, device=self.peer.device))
        return cache

    def _forward(self, block: slice) -> torch.Tensor:
        """Hidden states of a block, [R, B, H]."""
        columns_S = torch.arange(block.stop, device=self.peer.device)
        position_RS = columns_S[block] - self.padding_R[:, None]
        seen_R11S = (columns_S >= self.padding_R[:, None])[:, None, None]
        attend = masked(seen_R11S) if self.padding_R.any() else _attend_to_all
        return self.peer.hidden(self.ids_RS[:, block], position_RS, attend, self.cache)

    def _denoise(self, block: slice, open_R: torch.Tensor) -> None:
        """Forwards over a block until no open row has a mask in it."""
        ids_RB, step_RB = self.ids_RS[:, block], self.step_RS[:, block]  # views
        while (masked_RB := (ids_RB == self.rules.mask_token_id) & open_R[:, None]).any():
            hidden_MH = self.peer.normed(self._forward(block)[masked_RB])
            token_M, confidence_M = self._chosen((hidden_MH @ self.peer.head.T).float())
            token_RB = torch.zeros_like(ids_RB).masked_scatter_(masked_RB, token_M)
            confidence_RB = torch.full(ids_RB.shape, -1.0, device=ids_RB.device)
            confidence_RB.masked_scatter_(masked_RB, confidence_M)
            commit_RB = self._committed(confidence_RB) & masked_RB
            torch.where(commit_RB, token_RB, ids_RB, out=ids_RB)
            torch.where(commit_RB, self.forwards_R[:, None], step_RB, out=step_RB)
            self.forwards_R += masked_RB.any(dim=1)

    def _chosen(self, logits_MV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A token for each mask, and its probability."""
        logits_MV[:, list(self.rules.suppressed_ids)] = float("-inf")
        p_MV = logits_MV.softmax(dim=-1)
        if not self.rules.temperature:
            confidence_M, token_M = p_MV.max(dim=-1)
            return token_M, confidence_M
        token_M = (p_MV / torch.empty_like(p_MV).exponential_()).argmax(dim=-1)
        return token_M, p_MV.gather(1, token_M[:, None])[:, 0]

    def _committed(self, confidence_RB: torch.Tensor) -> torch.Tensor:
        """Those above the threshold; in rows with fewer than `min_commit` of them the surest."""
        above_RB = confidence_RB > self.rules.threshold
        surest = confidence_RB.topk(min(self.rules.min_commit, self.size), dim=1).indices
        surest_RB = torch.zeros_like(above_RB).scatter_(1, surest, True)
        return torch.where(above_RB.sum(1, keepdim=True) < self.rules.min_commit, surest_RB, above_RB)

    def _ended(self, block: slice) -> torch.Tensor:
        """Rows whose response has EOS in this block, [R]."""
        columns_B = torch.arange(block.start, block.stop, device=self.ids_RS.device) - self.padding_R[:, None]
        lengths_R1 = torch.tensor([[len(prompt)] for prompt in self.prompts], device=self.ids_RS.device)
        return ((self.ids_RS[:, block] == self.rules.eos_token_id) & (columns_B >= lengths_R1)).any(dim=1)

    def _answer(self, row: int) -> PeerAnswer:
        first = int(self.padding_R[row]) + len(self.prompts[row])
        last = self.begin + int(self.end_R[row])
        return PeerAnswer(self.ids_RS[row, first:last].tolist(), self.step_RS[row, first:last].tolist())


def _attend_to_all(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)
