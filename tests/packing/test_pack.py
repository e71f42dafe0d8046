"""Fill, packing and the layout of a row, on rows that a person can read; packing density on realistic lengths."""

import dataclasses

import numpy as np
import pytest
import torch

from dfactory.noise import EditTargets, GridMask, RandomMask
from dfactory.packing import PackedDocument, Packer, align, collate, pack_rows, share
from dfactory.types import WHOLE, AlignedDocument, Example, View
from dfactory.visibility import dense_mask

EOS, MASK = 0, 9


def example(ids, trainable, document_id=1):
    return Example(document_id, np.array(ids, np.int32), np.array(trainable, bool))


@pytest.mark.parametrize(
    "ids, trainable, aligned, marks",
    [
        ([5, 6, 7, 8, 1], [0, 0, 1, 1, 1], [5, 6, 7, 8, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1]),
        ([5, 6, 7, 8, 1], [0, 1, 1, 1, 0], [5, 6, 7, 8, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0, 0, 0]),
        ([5, 6, 7, 0], [0, 0, 1, 1], [5, 6, 7, 0], [0, 0, 1, 1]),
        ([5], [1], [5, 0, 0, 0], [1, 1, 1, 1]),
    ],
)
def test_align_fills_to_whole_blocks(ids, trainable, aligned, marks):
    document = align(example(ids, trainable), block_size=4, eos_id=EOS)
    assert document.input_ids_T.tolist() == aligned
    assert document.trainable_T.astype(int).tolist() == marks
    assert (document.input_ids_T.dtype, document.trainable_T.dtype) == (np.int32, bool)
    assert (document.document_id, document.num_blocks) == (1, len(aligned) // 4)


@pytest.mark.parametrize(
    "ids, trainable, steps, real",
    [
        ([5, 6, 7, 8, 0], [0, 0, 1, 1, 1], None, [2, 3, 4]),  # up to and including EOS
        ([5, 0, 7, 5, 8, 0], [0, 1, 0, 0, 1, 1], None, [1, 4, 5]),  # turns that EOS ends
        ([5, 6, 7, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1], None, [2, 3]),  # filled where the record was made
        ([5, 0, 0, 0], [0, 0, 1, 1], None, [2]),  # a prompt that ends with EOS, an empty answer
        ([0, 0, 0, 0], [1, 1, 1, 1], None, [0]),
        ([5, 6, 7, 0, 8, 0, 9, 9], [0, 0, 1, 1, 1, 1, 1, 1], [-1, -1, 0, 1, 2, 3, 4, 4], [2, 3]),  # a trace goes on
        ([5, 6, 7, 8, 8, 8, 9, 9], [0, 0, 1, 1, 1, 1, 1, 1], None, [2, 3, 4, 5, 6, 7]),  # cut before its end
    ],
)
def test_real_tokens_are_the_same_in_blocks_of_any_size(ids, trainable, steps, real):
    record = dataclasses.replace(example(ids, trainable), commit_step_T=steps and np.array(steps, np.int16))
    sizes = [1, 2, 4, 8, 16, 32] if ids[-1] == EOS or not steps else [8]
    for block_size in sizes:
        document = align(record, block_size, EOS)
        if ids[-1] != EOS and block_size > len(ids):
            real_here = [*real, len(ids)]  # the EOS that ends it comes from the fill
        else:
            real_here = real
        assert np.flatnonzero(document.real_T).tolist() == real_here
        everything = np.arange(len(document.input_ids_T), dtype=np.int32)
        view = View(everything, document.input_ids_T, document.trainable_T, *[np.ones(len(everything), np.float32)] * 2)
        batch = collate([[PackedDocument(document, [view])]], block_size)
        assert batch.answer_length_D.tolist() == [len(real_here)]
        assert batch.position_ids_RS.flatten()[batch.target_index_N[batch.real_N]].tolist() == real_here
        assert batch.response_length_D.tolist() == [int(document.trainable_T.sum())]


TURNS = [5, 6, 7, 1, 4, 5, 6, 8, 1, 5, 7, 7, 8, 8, 0]  # 1 ends an answer, 4 and 5 begin a question
ANSWERS = [0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1]
VIEW_MAKERS = {
    "mask": RandomMask(MASK, seed=0, low=0.2, high=0.9, complementary=True, num_views=4),
    "exact": RandomMask(MASK, seed=0, low=0.0, high=1.0, mask_count="exact"),
    "grid": GridMask(MASK, seed=0, levels=(0.1, 0.5, 0.9)),
    "edit": EditTargets(
        RandomMask(MASK, seed=0, low=0.2, high=0.9),
        mask_id=MASK,
        text_ids=np.arange(2, 9),
        seed=0,
        edit_share=0.3,
        num_turns=2,
    ),
}


@pytest.mark.parametrize("name", VIEW_MAKERS)
@pytest.mark.parametrize(
    "block_size, shown",
    [
        (2, [5, 6, 7, 1, 4, 5, 6, 8, 1, 0, 7, 7, 8, 8, 0, 0]),
        (4, [5, 6, 7, 1, 4, 5, 6, 8, 1, 0, 0, 0, 8, 8, 0, 0]),
        (8, [5, 6, 7, 1, 4, 5, 6, 8, 1, 5, 7, 7, 8, 8, 0, 0]),  # another answer begins in each block
        (3, [5, 6, 7, 1, 0, 0, 6, 8, 1, 5, 7, 7, 8, 8, 0]),
        (5, [5, 6, 7, 1, 0, 5, 6, 8, 1, 0, 7, 7, 8, 8, 0]),
    ],
)
def test_no_view_shows_the_turn_that_follows_an_answer(name, block_size, shown):
    """There is fill, which has to be produced as that at the end of the record. The clean stream has the true text."""
    filled, text = (align(example(TURNS, ANSWERS), block_size, EOS, after_answer=kind) for kind in ("fill", "text"))
    fill_T = filled.trainable_T & ~text.trainable_T
    assert filled.view_ids_T.tolist() == shown
    assert np.array_equal(filled.real_T, text.real_T)
    assert (filled.view_ids_T[fill_T] == EOS).all()
    predicted_T = np.zeros(len(shown), bool)
    for view in (view for visit in range(20) for view in VIEW_MAKERS[name](filled, visit)):
        here = filled.trainable_T[view.position_P]
        assert view.input_ids_P[~here].tolist() == np.array(shown)[view.position_P[~here]].tolist()
        assert not (view.target_P & ~here).any()
        predicted_T[view.position_P[view.target_P]] = True
    assert predicted_T[fill_T].all() or name == "grid"  # the same masks on every visit
    for view in VIEW_MAKERS[name](text, 0):
        others = ~text.trainable_T[view.position_P]
        assert view.input_ids_P[others].tolist() == text.input_ids_T[view.position_P[others]].tolist()
    batches = [collate([[PackedDocument(d, VIEW_MAKERS[name](d, 0))]], block_size) for d in (filled, text)]
    position_N = batches[0].position_ids_RS.flatten()[batches[0].target_index_N]
    assert batches[0].target_ids_N.tolist() == np.array(shown)[position_N].tolist()
    assert torch.equal(batches[0].answer_length_D, batches[1].answer_length_D)
    clean = batches[0].view_RS == 0
    assert torch.equal(batches[0].input_ids_RS[clean], batches[1].input_ids_RS[clean])


def test_a_turn_is_trained_as_it_would_be_at_the_end_of_a_record():
    """The views of the first answer's blocks are those of the record that ends with it."""
    whole, alone = (align(example(TURNS[:n], ANSWERS[:n]), 5, EOS) for n in (len(TURNS), 4))
    for view, first in zip(*(VIEW_MAKERS["mask"](document, 0) for document in (whole, alone)), strict=True):
        here = view.position_P < 5
        assert np.array_equal(view.position_P[here], first.position_P)
        assert np.array_equal(view.input_ids_P[here], first.input_ids_P)
        assert np.array_equal(view.target_P[here], first.target_P)


@pytest.mark.parametrize("block_size", [1, 2, 4, 8])
def test_a_record_of_one_turn_is_shown_as_it_is(block_size):
    for ids, marks in [([5, 6, 7, 8, 1, 0], [0, 0, 1, 1, 1, 1]), ([5, 6, 0, 7, 8], [1] * 5)]:
        document = align(example(ids, marks), block_size, EOS)
        assert np.array_equal(document.view_ids_T, document.input_ids_T)


def test_a_document_shorter_than_a_block_is_one_block():
    """Filled to a multiple of `unit` only; a longer one has whole blocks, and no block is smaller than asked for."""
    ids = [5, 6, 7, 8, 1]
    for block_size, unit, aligned, size in [(64, 4, 8, 8), (64, 2, 6, 6), (4, 2, 8, 4), (2, 4, 6, 2), (1, 4, 5, 1)]:
        document = align(example(ids, [1] * 5), block_size, EOS, unit)
        assert (len(document.input_ids_T), document.block_size) == (aligned, size)
        assert document.trainable_T.all()


@pytest.mark.parametrize(
    "unit, aligned", [(None, 5), (1, 5), (4, 8), (5, 5), (16, 16)], ids=["none", "one", "four", "five", "all"]
)
def test_a_whole_document_is_filled_to_a_unit(unit, aligned):
    """With full attention. The fill is trained, but it is not real; the view holds it all."""
    document = align(example([5, 6, 7, 8, EOS], [0, 0, 1, 1, 1]), WHOLE, EOS, unit)
    assert document.input_ids_T.tolist() == [5, 6, 7, 8] + [EOS] * (aligned - 4)
    assert document.block_size == aligned
    assert document.trainable_T.tolist() == [False] * 2 + [True] * (aligned - 2)
    assert document.real_T.tolist() == [False] * 2 + [True] * 3 + [False] * (aligned - 5)
    (view, _) = VIEW_MAKERS["mask"](document, 0)[:2]
    assert view.position_P.tolist() == list(range(aligned))
    batch = collate([[PackedDocument(document, [view])]], WHOLE)
    assert (int(batch.response_length_D), int(batch.answer_length_D)) == (aligned - 2, 3)


def test_a_document_of_one_block_has_no_clean_stream():
    """Its view sees itself and the prompt that is part of it; nobody would look at a clean copy."""
    document = AlignedDocument(7, np.arange(6, dtype=np.int32), np.arange(6) >= 2, block_size=6)
    noised = View(np.arange(6, dtype=np.int32), np.full(6, MASK, np.int32), np.arange(6) >= 2, *[np.ones(6)] * 2)
    batch = collate([[PackedDocument(document, [noised])]], block_size=2)
    assert batch.view_RS.tolist() == [[1] * 6]
    assert batch.block_RS.tolist() == [[0] * 6]
    assert batch.target_index_N.tolist() == [2, 3, 4, 5]


def test_a_row_takes_the_oldest_and_then_the_largest_that_fits():
    #         0  1  2  3  4  5
    costs = [4, 3, 6, 2, 6, 8]
    assert list(pack_rows(costs, row_length=10)) == [[0, 2], [1, 4], [3, 5]]


def test_among_equals_the_oldest_goes_first():
    assert list(pack_rows([2, 2, 2, 2, 2], row_length=4)) == [[0, 1], [2, 3], [4]]


def test_look_ahead_is_bounded():
    assert list(pack_rows([6, 6, 4], row_length=10, lookahead=2)) == [[0], [1, 2]]
    assert list(pack_rows([6, 6, 4], row_length=10, lookahead=3)) == [[0, 2], [1]]


def test_without_packing_each_document_has_its_row():
    assert list(pack_rows([1, 2, 3], row_length=10, packing=False)) == [[0], [1], [2]]


def test_a_document_that_fits_no_row():
    with pytest.raises(ValueError, match="11 positions does not fit a row of 10"):
        list(pack_rows([3, 11], row_length=10))


def test_instruction_like_lengths_fill_rows_to_95_percent():
    """Log-normal lengths around 200 tokens, block 32, two views of the answer, as in instruction data."""
    rng = np.random.default_rng(0)
    length = np.clip(rng.lognormal(5.3, 0.8, 512), 16, 2048).astype(int)
    answer = np.maximum(1, (length * rng.uniform(0.2, 0.9, 512)).astype(int))
    blocks = -(-length // 32)
    costs = 32 * (blocks + 2 * (blocks - (length - answer) // 32))
    rows = list(pack_rows(costs.tolist(), row_length=6144))
    assert sorted(index for row in rows for index in row) == list(range(512))
    assert all(costs[row].sum() <= 6144 for row in rows)
    assert costs.sum() / (len(rows) * 6144) >= 0.95


def test_a_packer_goes_on_from_what_was_waiting():
    rng = np.random.default_rng(1)
    costs = rng.integers(1, 60, 100).tolist()
    packer = Packer(100, lookahead=100)
    for index, cost in enumerate(costs):
        packer.add(cost, index)
    for _ in range(7):
        packer.next_row()
    again = Packer(100, lookahead=100)
    for index in packer.waiting:
        again.add(costs[index], index)
    rest = [packer.next_row() for _ in range(10)]
    assert rest[0]
    assert [again.next_row() for _ in range(10)] == rest


# --- collate ---------------------------------------------------------------------------------------------------------


def view(position, ids, target, t=0.5):
    size = len(position)
    weight = np.full(size, 1 / t, np.float32)
    return View(
        np.array(position, np.int32),
        np.array(ids, np.int32),
        np.array(target, bool),
        np.full(size, t, np.float32),
        weight,
    )


def document(document_id, ids, trainable, *views):
    return PackedDocument(AlignedDocument(document_id, np.array(ids, np.int32), np.array(trainable, bool), 2), views)


FIRST = document(
    70, [1, 2, 3, 4], [0, 0, 1, 1], view([2, 3], [MASK, 4], [1, 0]), view([2, 3], [3, MASK], [0, 1], t=0.25)
)
SECOND = document(80, [5, 6], [0, 1], view([0, 1], [5, MASK], [0, 1]))


def test_two_documents_in_a_row():
    """No view sees the clean copy of the last block, so it is not there; a document of one block has no clean stream."""
    batch = collate([[FIRST, SECOND]], block_size=2, pad_to=10)
    #                                  clean view 1   view 2   view 1   padding
    assert batch.input_ids_RS.tolist() == [[1, 2, MASK, 4, 3, MASK, 5, MASK, 0, 0]]
    assert batch.position_ids_RS.tolist() == [[0, 1, 2, 3, 2, 3, 0, 1, 0, 0]]
    assert batch.document_RS.tolist() == [[0, 0, 0, 0, 0, 0, 1, 1, -1, -1]]
    assert batch.view_RS.tolist() == [[0, 0, 1, 1, 2, 2, 1, 1, 0, 0]]
    assert batch.block_RS.tolist() == [[0, 0, 1, 1, 1, 1, 0, 0, 0, 0]]
    assert batch.target_index_N.tolist() == [2, 5, 7]
    assert batch.target_ids_N.tolist() == [3, 4, 6]
    assert batch.t_N.tolist() == [0.5, 0.25, 0.5]
    assert batch.elbo_weight_N.tolist() == [2.0, 4.0, 2.0]
    assert batch.document_id_D.tolist() == [70, 80]
    assert batch.response_length_D.tolist() == [2, 1]
    assert batch.num_views_D.tolist() == [2, 1]
    assert batch.document_N.tolist() == [0, 0, 1]
    assert batch.view_N.tolist() == [1, 2, 1]
    assert batch.num_tokens == 8
    assert batch.sum_by_document(torch.tensor([1.0, 2.0, 4.0])).tolist() == [3.0, 4.0]


def test_columns_of_views_come_to_be_columns_of_targets():
    one, twin = (
        dataclasses.replace(v, columns_P={"drafted": np.array(drafted)})
        for v, drafted in zip(FIRST.views, ([True, False], [True, False]), strict=True)
    )
    batch = collate([[FIRST._replace(views=[one, twin])], []], block_size=2)
    assert batch.input_N.tolist() == [MASK, MASK]
    assert batch.columns["drafted_N"].tolist() == [True, False]  # position 2 of the view, position 3 of its twin
    with pytest.raises(ValueError, match="column drafted_N: 1 of 2 views have it"):
        collate([[FIRST._replace(views=[one, FIRST.views[1]])]], block_size=2)


def test_documents_are_numbered_over_all_rows():
    batch = collate([[FIRST], [], [SECOND, SECOND]], block_size=2)
    assert batch.input_ids_RS.shape == (3, 6)
    assert batch.document_RS[0].tolist() == [0] * 6
    assert batch.document_RS[1].tolist() == [-1] * 6
    assert batch.document_RS[2].tolist() == [1, 1, 2, 2, -1, -1]
    assert batch.target_index_N.tolist() == [2, 5, 13, 15]
    assert batch.document_N.tolist() == [0, 0, 1, 2]


def test_a_view_sees_the_clean_past_and_itself():
    place = collate([[FIRST]], block_size=2).place_RS.at(0)
    assert dense_mask(place).int().tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 1],
        [1, 1, 0, 0, 1, 1],
    ]


def sides(*ids, prompt=3, block_size=2):
    """Documents with a view of everything behind the prompt's whole blocks, all masked."""
    made = []
    for tokens in ids:
        trainable = np.arange(len(tokens)) >= prompt
        position = np.arange(prompt // block_size * block_size, len(tokens))
        masked = np.where(position >= prompt, MASK, np.array(tokens)[position])
        aligned = AlignedDocument(5, np.array(tokens, np.int32), trainable, block_size)
        made.append(PackedDocument(aligned, [view(position, masked, position >= prompt)]))
    return made


def test_documents_of_one_prompt_share_its_whole_blocks():
    """A trunk of its own number, 2 + 0, stands before the first document; targets and columns know nothing of it."""
    chosen, rejected = share(sides([1, 2, 3, 4, 5, 6], [1, 2, 3, 7, 8, 8]))
    assert (chosen.shared, rejected.shared) == (0, 2)
    assert (chosen.cost, rejected.cost) == (8, 6)
    batch = collate([[chosen, rejected]], block_size=2, pad_to=15)
    #                                  trunk clean view              clean view              padding
    assert batch.input_ids_RS.tolist() == [[1, 2, 3, 4, 3, MASK, MASK, MASK, 3, 7, 3, MASK, MASK, MASK, 0]]
    assert batch.position_ids_RS.tolist() == [[0, 1, 2, 3, 2, 3, 4, 5, 2, 3, 2, 3, 4, 5, 0]]
    assert batch.document_RS.tolist() == [[2, 2, *[0] * 6, *[1] * 6, -1]]
    assert batch.trunk_RS.tolist() == [[2] * 14 + [-1]]
    assert batch.view_RS.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0]]
    assert batch.block_RS.tolist() == [[0, 0, 1, 1, 1, 1, 2, 2, 1, 1, 1, 1, 2, 2, 0]]
    assert batch.target_index_N.tolist() == [5, 6, 7, 11, 12, 13]
    assert batch.document_N.tolist() == [0, 0, 0, 1, 1, 1]
    assert batch.target_ids_N.tolist() == [4, 5, 6, 7, 8, 8]
    assert (batch.document_id_D.tolist(), batch.num_views_D.tolist()) == ([5, 5], [1, 1])
    assert batch.num_tokens == 14
    assert batch.sum_by_document(torch.ones(6)).tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    "documents, shared",
    [
        (sides([1, 2, 3, 4, 5, 6]), []),  # alone
        (sides([1, 3, 4, 5], [1, 6, 4, 5], prompt=1), [0]),  # the prompt is shorter than a block
        (sides([1, 2, 3, 4], [1, 2, 5, 6], prompt=2), [2]),  # it ends with a block
        (sides([1, 2, 3, 4], [9, 2, 3, 4]), [0]),  # different prompts, as diffu_grpo hides them
        (sides([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7, 8]), [4]),  # the block after the prompt is alike, too
        (sides([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]), [4]),  # nobody sees the clean copy of the last block
        (sides([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7, 8], [1, 2, 3, 9]), [2, 2]),  # what all have
        (sides([1, 2, 3, 4], prompt=2) + sides([1, 2, 3, 4], prompt=2, block_size=1), [0]),
    ],
)
def test_what_is_shared(documents, shared):
    first, *others = share(documents)
    assert first.shared == 0
    assert [packed.shared for packed in others] == shared
    again = share([first, *others])
    assert [packed.shared for packed in again] == [0, *shared]


def test_neighbours_that_share_nothing_have_no_trunk_between_them():
    pair, alone = share(sides([1, 2, 3, 4], [1, 2, 5, 6], prompt=2)), share(sides([1, 2, 3, 4], prompt=2))
    batch = collate([[*alone, *pair], pair], block_size=2)
    assert batch.document_RS.tolist() == [[0] * 4 + [6] * 2 + [1] * 2 + [2] * 2, [8] * 2 + [3] * 2 + [4] * 2 + [-1] * 4]
    assert batch.trunk_RS.tolist() == [[0] * 4 + [6] * 6, [8] * 6 + [-1] * 4]


def test_rows_without_documents_are_padding():
    batch = collate([[], []], block_size=2, pad_to=4)
    assert batch.document_RS.tolist() == [[-1] * 4] * 2
    assert (batch.num_targets, batch.num_tokens) == (0, 0)
    assert batch.document_id_D.shape == batch.num_views_D.shape == (0,)
    assert collate([[]], block_size=2).input_ids_RS.shape == (1, 2)


def test_types():
    batch = collate([[FIRST], []], block_size=2)
    others = {"t_N": torch.float32, "elbo_weight_N": torch.float32, "real_N": torch.bool}
    for name, value in vars(batch).items():
        if name == "columns":
            continue
        assert value.dtype == others.get(name, torch.int64), name


def test_a_row_that_does_not_fit():
    with pytest.raises(ValueError, match="8 positions is longer than pad_to 6"):
        collate([[FIRST, SECOND]], block_size=2, pad_to=6)


def left_neighbours(batch, within_views: bool) -> list[int]:
    """The obvious search for each target's left neighbour."""
    document, view, position, trunk, block = (
        field.flatten().tolist()
        for field in (batch.document_RS, batch.view_RS, batch.position_ids_RS, batch.trunk_RS, batch.block_RS)
    )
    found = []
    for index in batch.target_index_N.tolist():
        before = [i for i in range(len(position)) if position[i] == position[index] - 1 and document[i] >= 0]
        own = [i for i in before if (document[i], view[i]) == (document[index], view[index])]
        own = [i for i in own if within_views or block[i] == block[index]]
        clean = [i for i in before if view[i] == 0 and document[i] in (document[index], trunk[index])]
        found.append((own or clean or [index])[0])
    return found


@pytest.mark.parametrize("block_size", [1, 2, 4, WHOLE])
def test_left_neighbours(block_size):
    """In the view, in the clean stream where the view lacks that block, in a shared prefix, or none."""
    noise = RandomMask(mask_id=99, seed=3, low=0.9, high=1.0, per_block=True, num_views=2, complementary=False)
    packed = []
    for number, trained in enumerate(["000111000111", "000000111111", "111111111111"]):
        trainable_T = np.array([digit == "1" for digit in trained])
        ids_T = np.array([*range(6), *(10 * number + 6 + np.arange(6))], np.int32)
        document = align(Example(number // 2, ids_T, trainable_T), block_size, eos_id=0)  # the first two are a pair
        packed.append(PackedDocument(document, noise(document, 0)))
    shared = share(packed[:2])
    assert block_size == WHOLE or shared[1].shared > 0
    batch = collate([[*shared, packed[2]], [packed[0]]], block_size)
    assert batch.num_targets > 30
    assert batch.left_index_N.tolist() == left_neighbours(batch, within_views=True)
    assert batch.clean_left_index_N.tolist() == left_neighbours(batch, within_views=False)
