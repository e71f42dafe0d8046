"""Who sees whom: the one attention rule of training, scoring and decoding (docs/method.md#visibility).

A token's place is (document, view, block, trunk). View 0 is the clean stream, views 1..K are noised copies. The whole rule:

    a token sees the clean past of its document, and its own block in its own stream.

So a clean token of block b sees clean blocks <= b, a token of view k in block b sees clean blocks < b and block b of
view k, and nothing ever crosses documents or runs from one view into another. The rule is written once, in `visible`;
the dense mask, the segment plan on CPUs and the flex_attention mask are all built from it.

    document  0 0 0 0 | view 1 of the last block      keys ->  c0 c1 c2 c3 v2 v3
    block     0 0 1 1 | 1 1                            c0       x  x  .  .  .  .
    view      0 0 0 0 | 1 1                            c2       x  x  x  x  .  .
                                                       v2       x  x  .  .  x  x

With causal context a clean token is a block of its own, and the canvas of a view is one block, numbered by its first
position: the same rule lets a clean token see the clean tokens up to itself, and a canvas those before it and all of
itself. A layer with a sliding window w sees the last w of those positions, the query's own block counted as one: the same
clean tokens for all positions of a canvas.

    document  0 0 0 0 | view 1, canvas of positions 2, 3      keys ->  c0 c1 c2 c3 v2 v3      window 2
    block     0 1 2 3 | 2 2                                    c0       x  .  .  .  .  .       x  .  .  .  .  .
    view      0 0 0 0 | 1 1                                    c2       x  x  x  .  .  .       .  x  x  .  .  .
                                                               v2       x  x  .  .  x  x       .  x  .  .  x  x

Documents with equal first blocks may share one copy of their clean past: a shared prefix (`trunk`), which is a document
of its own with a clean stream only. Each of them names the prefix, and its own clean stream starts where the prefix
ends. Keys and values in the prefix equal those that each document would compute for itself, so sharing is exact.
"""

import torch

from dfactory.types import PADDING, Place


def visible(query: Place, key: Place, window: int | None = None):
    """Whether `query` may attend to `key`: a boolean of the broadcast shape, for tensors and arrays. `window`: of a layer
    with a sliding window; blocks are numbered by positions then."""
    own = query.document == key.document
    clean_past = (own | (query.trunk == key.document)) & (key.view == 0) & (key.block < query.block)
    if window is not None:
        clean_past = clean_past & (query.block - key.block < window)
    own_block = own & (key.view == query.view) & (key.block == query.block)
    return (query.document != PADDING) & (clean_past | own_block)


def dense_mask(place: Place, window: int | None = None):
    """The rule as a boolean mask [..., S, S] (query, key) for places of shape [..., S]. For tests and short sequences."""
    query = Place(*(field[..., :, None] for field in place))
    key = Place(*(field[..., None, :] for field in place))
    return visible(query, key, window)


def flex_mask_mod(place_RS: Place, window: int | None = None):
    """The rule as a `mask_mod` for torch's flex_attention, over places of shape [R, S]."""
    if window is not None:  # a number would become part of the compiled kernel
        window = torch.tensor(window, device=place_RS.block.device)

    def mask_mod(row, head, query_index, key_index):
        return visible(place_RS.at((row, query_index)), place_RS.at((row, key_index)), window)

    return mask_mod
