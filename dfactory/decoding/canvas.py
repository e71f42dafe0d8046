"""Decoding with full attention: every forward sees the prompt and all masks of the answer, and nothing is cached.

    canvas    p p p p | . . . . | . . . .        block size 4, prompt of 4, at most 8 new tokens
    block                 0         1            counted from the end of the prompt

Only the masks of one block become tokens at a time, blocks from left to right, but each forward runs over the whole canvas:
every token sees every other, so keys and values of a finished block still change. A block as long as max_new_tokens, which
`decode.block_size: null` means, is the sampler of models without blocks. Canvases of several slots lie one after another in
a single row and never see each other.

With classifier-free guidance a response has a second canvas, whose prompt is masked. The last block may be short.

With shifted logits a masked position is predicted from its left neighbour, the last token of the prompt at first.

Letters: R responses, C canvases, N tokens of all of them or open positions, B block size, H hidden.
"""

import numpy as np
import torch

from dfactory.decoding.response import Response
from dfactory.decoding.slots import Slots
from dfactory.types import EmbeddingInputs, Place


class CanvasDecoder(Slots):
    """Responses of models with full attention."""

    canvas = True

    def _denoise(self, open_RB: np.ndarray) -> torch.Tensor:
        """[N, H]; where a response is guided [N, 2, H], with the prompt and without it."""
        guided_R = np.array([response.rules.distribution.cfg_scale > 0 for response in self.live])
        canvases = [response.tokens_T[: response.stop] for response in self.live]
        canvases += [_without_prompt(response) for response, guided in zip(self.live, guided_R, strict=True) if guided]
        start_C = np.cumsum([0, *map(len, canvases[:-1])])
        here_RB = np.array([response.here.start for response in self.live])[:, None] + np.arange(self.block_size)
        index_N = (start_C[: len(self.live), None] + here_RB)[open_RB]
        if not guided_R.any():
            return self._forward(canvases, index_N)
        second_N = (start_C[len(self.live) :, None] + here_RB[guided_R])[open_RB[guided_R]]
        hidden_NH = self._forward(canvases, np.concatenate([index_N, second_N]))
        without_N = np.arange(len(index_N))  # who is not guided gets its own states twice
        without_N[np.repeat(guided_R, open_RB.sum(axis=1))] = len(index_N) + np.arange(len(second_N))
        return torch.stack([hidden_NH[: len(index_N)], hidden_NH[torch.from_numpy(without_N).to(hidden_NH.device)]], 1)

    def _forward(self, canvases: list[np.ndarray], index_N: np.ndarray) -> torch.Tensor:
        """Hidden states [N, H] that predict some tokens of the canvases, laid end to end."""
        device = self.policy.device
        lengths = [len(canvas) for canvas in canvases]
        ids_1N = torch.from_numpy(np.concatenate(canvases))[None].to(device)
        position_1N = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None].to(device)
        canvas_1N = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))[None].to(device)
        nought_1N = torch.zeros_like(canvas_1N)
        plan = self.policy.plan(Place(canvas_1N, nought_1N, nought_1N, canvas_1N))  # one document, one block each
        predicting_N = self.policy.predicting(torch.from_numpy(index_N).to(device), position_1N)
        return self.policy.hidden_at(predicting_N, EmbeddingInputs(ids_1N, noise=None), position_1N, plan)


def _without_prompt(response: Response) -> np.ndarray:
    tokens = response.tokens_T[: response.stop].copy()
    tokens[: response.start] = response.rules.mask_token_id
    return tokens
