"""Decoding with full attention: every forward sees the prompt and all masks of the answer, and nothing is cached.

    canvas    p p p p | . . . . | . . . .        block size 4, prompt of 4, at most 8 new tokens
    block                 0         1            counted from the end of the prompt

Only the masks of one block become tokens at a time, blocks from left to right, but each forward runs over the whole canvas:
every token sees every other, so keys and values of a finished block still change. A block as long as max_new_tokens, which
`decode.block_size: null` means, is the sampler of models without blocks. Canvases of several slots lie one after another in
a single row and never see each other.

With shifted logits a masked position is predicted from its left neighbour, the last token of the prompt at first.

Letters: R canvases, N tokens of all of them, B block size, H hidden.
"""

import numpy as np
import torch

from dfactory.decoding.slots import Decodable, Slots
from dfactory.errors import ConfigError
from dfactory.types import EmbeddingInputs, Place


class CanvasDecoder(Slots):
    """Responses of models with full attention."""

    canvas = True

    def __init__(self, policy: Decodable, block_size: int, slots: int, capacity: int, *, cuda_graphs: bool = False):
        if cuda_graphs:
            raise ConfigError(
                "decode.cuda_graphs true with full attention: canvases have all lengths, and recorded forwards a few fixed "
                "shapes; set it to false"
            )
        super().__init__(policy, block_size, slots, capacity)

    def _denoise(self, open_RB: np.ndarray) -> torch.Tensor:
        device = self.policy.device
        lengths = [len(response.tokens_T) for response in self.live]
        start_R = np.cumsum(lengths) - lengths  # of each canvas in the row
        here_RB = np.array([response.here.start for response in self.live])[:, None] + np.arange(self.block_size)
        open_N = torch.from_numpy((start_R[:, None] + here_RB)[open_RB]).to(device)
        ids_1N = torch.from_numpy(np.concatenate([response.tokens_T for response in self.live]))[None].to(device)
        position_1N = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None].to(device)
        canvas_1N = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))[None].to(device)
        nought_1N = torch.zeros_like(canvas_1N)
        plan = self.policy.plan(Place(canvas_1N, nought_1N, nought_1N, canvas_1N))  # one document, one block each
        predicting_N = self.policy.predicting(open_N, position_1N)
        return self.policy.hidden_at(predicting_N, EmbeddingInputs(ids_1N, noise=None), position_1N, plan)
