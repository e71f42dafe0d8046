"""Who sees whom, on rows that a person can read. Expected masks are typed in: x sees, . does not."""

import numpy as np
import pytest
import torch

from dfactory.types import PADDING, Place
from dfactory.visibility import dense_mask, flex_mask_mod, visible
from tests.reference import dense_table, step_mask


def places(document, view, block, trunk=None, tensors=True):
    """One row from strings, a character a token; '-' is padding. Without `trunk` every document names itself."""
    texts = (document, view, block, trunk or document)
    columns = [[PADDING if c == "-" else int(c) for c in text.replace(" ", "")] for text in texts]
    make = torch.tensor if tensors else np.array
    return Place(*(make([column]) for column in columns))


def drawn(mask_SS) -> list[str]:
    return ["".join("x" if seen else "." for seen in row) for row in mask_SS.tolist()]


# name: (document, view, block, expected[, trunk])
ROWS = {
    "a clean document of two blocks": (
        "0000",
        "0000",
        "0011",
        [
            "xx..",
            "xx..",
            "xxxx",
            "xxxx",
        ],
    ),
    "two views of the last block": (
        "0000 00 00",
        "0000 11 22",
        "0011 11 11",
        [
            "xx.. .. ..",  # clean, block 0
            "xx.. .. ..",
            "xxxx .. ..",  # clean, block 1: never a view
            "xxxx .. ..",
            "xx.. xx ..",  # view 1: the clean blocks before it, and its own block of its own view
            "xx.. xx ..",
            "xx.. .. xx",  # view 2: the same, not view 1
            "xx.. .. xx",
        ],
    ),
    "causal context, and a canvas of positions 2 and 3": (
        "0000 00",
        "0000 11",
        "0123 22",
        [
            "x... ..",
            "xx.. ..",
            "xxx. ..",
            "xxxx ..",
            "xx.. xx",
            "xx.. xx",
        ],
    ),
    "a view of both blocks": (
        "00 00 0000",
        "00 00 1111",
        "00 11 0011",
        [
            "xx .. ....",
            "xx .. ....",
            "xx xx ....",
            "xx xx ....",
            ".. .. xx..",  # block 0 of the view has no past
            ".. .. xx..",
            "xx .. ..xx",  # block 1 sees clean block 0, not the view's block 0
            "xx .. ..xx",
        ],
    ),
    "two documents": (
        "000 11 111",
        "001 00 011",
        "011 00 101",
        [
            "x.. .. ...",
            "xx. .. ...",
            "x.x .. ...",
            "... xx ...",
            "... xx ...",
            "... xx x..",  # the second document's own blocks count from its start
            "... .. .x.",
            "... xx ..x",
        ],
    ),
    "padding sees nothing and is seen by nothing": (
        "00--00--",
        "00000000",
        "00000000",
        [
            "xx..xx..",
            "xx..xx..",
            "........",
            "........",
            "xx..xx..",
            "xx..xx..",
            "........",
            "........",
        ],
    ),
    "two documents with a trunk": (
        "222 00000 111 3",
        "000 00011 011 0",
        "001 23423 212 0",
        [
            "xx. ..... ... .",  # the trunk is clean past alone, and sees no branch
            "xx. ..... ... .",
            "xxx ..... ... .",
            "xxx x.... ... .",  # a branch's clean stream goes on behind it
            "xxx xx... ... .",
            "xxx xxx.. ... .",
            "xxx ...x. ... .",  # views see the trunk and their own branch, not the other one
            "xxx x...x ... .",
            "xxx ..... x.. .",
            "xx. ..... .x. .",  # a view of a block that the trunk holds: its clean copy is not past
            "xxx ..... ..x .",
            "... ..... ... x",  # somebody else
        ],
        "222 22222 222 3",
    ),
}


def row(name):
    """The places and the expected lines of a row."""
    document, view, block, expected, *trunk = ROWS[name]
    return (document, view, block, *trunk), [line.replace(" ", "") for line in expected]


@pytest.mark.parametrize("name", ROWS)
def test_the_rule_on_rows_a_person_can_read(name):
    texts, expected = row(name)
    assert drawn(dense_mask(places(*texts))[0]) == expected
    assert drawn(dense_mask(places(*texts, tensors=False))[0]) == expected
    assert drawn(dense_table(*places(*texts))[0]) == expected


@pytest.mark.parametrize("name", ROWS)
def test_the_flex_mask_is_the_dense_mask(name):
    from torch.nn.attention.flex_attention import create_mask

    place = places(*row(name)[0])
    rows, length = place.document.shape
    mask = create_mask(flex_mask_mod(place), rows, None, length, length, device="cpu")
    assert torch.equal(mask[:, 0], dense_mask(place))


def test_arrays_and_tensors_agree_on_random_places():
    draw = np.random.default_rng(0)
    fields = [draw.integers(low, 4, (3, 40)) for low in (PADDING, 0, 0, 0)]
    arrays = Place(*fields)
    tensors = Place(*map(torch.from_numpy, fields))
    seen = dense_mask(arrays)
    assert np.array_equal(seen, dense_mask(tensors).numpy())
    assert np.array_equal(seen, dense_table(*tensors).numpy())
    assert 0 < seen.mean() < 1


def test_a_query_elsewhere_than_its_keys():
    """Decoding asks for a block against cached keys: 2 queries of block 1 against 4 keys of blocks 0 and 1."""
    query = Place(*(torch.tensor(f)[:, None] for f in ([0, 0], [0, 0], [1, 1], [0, 0])))
    key = Place(*(torch.tensor(f)[None] for f in ([0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1])))
    assert drawn(visible(query, key)) == ["xxx.", "xxx."]


def test_noisy_and_clean_of_one_document_is_the_table_of_the_method():
    length, block_size = 12, 4
    block = torch.arange(length) // block_size
    zeros = torch.zeros(1, 2 * length, dtype=torch.int64)
    place = Place(
        zeros,
        torch.cat([torch.ones(length), torch.zeros(length)])[None].long(),
        block.repeat(2)[None],
        zeros,
    )
    assert torch.equal(dense_mask(place)[:, None], step_mask(length, block_size) == 0)


def test_a_sliding_window_counts_from_where_a_canvas_begins():
    """Window 2: a clean token sees itself and the one before; a canvas sees one token before it, whatever its position."""
    place = places("00000 00 00", "00000 11 11", "01234 22 44")
    expected = [
        "x.... .. ..",
        "xx... .. ..",
        ".xx.. .. ..",
        "..xx. .. ..",
        "...xx .. ..",
        ".x... xx ..",
        ".x... xx ..",
        "...x. .. xx",
        "...x. .. xx",
    ]
    assert drawn(dense_mask(place, window=2)[0]) == [row.replace(" ", "") for row in expected]
    assert torch.equal(dense_mask(place, window=9), dense_mask(place))
