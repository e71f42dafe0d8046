"""The global stream of rows: its order, its independence of ranks, its end, and resuming it."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from dfactory.config.data import DatasetKeys
from dfactory.data.examples import load_examples
from dfactory.data.source import RecordSource
from dfactory.errors import CheckpointError, ConfigError
from dfactory.packing import align
from dfactory.types import PADDING, WHOLE, View

BLOCK, EOS, MASK = 4, 1, 2


def one_view(document, visit):
    """Masks the whole response; t tells the visit, so that tests can read it off a batch."""
    blocks = np.repeat(document.trainable_T.reshape(-1, document.block_size).any(axis=1), document.block_size)
    position_P = np.flatnonzero(blocks).astype(np.int32)
    target_P = document.trainable_T[position_P]
    ids_P = np.where(target_P, MASK, document.input_ids_T[position_P]).astype(np.int32)
    t_P = np.full(len(position_P), visit, np.float32)
    return [View(position_P, ids_P, target_P, t_P, t_P)]


@pytest.fixture
def examples(write):
    """37 documents of file "a" and 5 of file "b", of 3 to 20 tokens, the first third of each a prompt."""

    def rows(count):
        return [{"input_ids": [30] * (3 + i * 7 % 18), "prompt_lengths": 1 + i * 7 % 18 // 3} for i in range(count)]

    paths = [write(*rows(37), name="a.jsonl"), write(*rows(5), name="b.jsonl")]
    return load_examples(
        [DatasetKeys(path) for path in paths], None, max_length=20, overlong="refuse", on_bad_row="error",
        max_bad_fraction=0.0, block_size=BLOCK, eos_id=EOS, vocab_size=64,
    )  # fmt: skip


@pytest.fixture
def source(examples):
    def make(weights=(1, 1), **changes):
        options = {"num_views": 1, "block_size": BLOCK, "eos_id": EOS, "row_length": 48, "seed": 3, "max_epochs": 2}
        return RecordSource(examples, weights, one_view, **{**options, **changes})

    return make


def rows_of(batches):
    """[(document id, visit), ...] of each row of some micro-batches, in order."""
    rows = []
    for batch in batches:
        visit = {d: int(t) for d, t in zip(batch.document_N.tolist(), batch.t_N.tolist(), strict=True)}
        for document_S in batch.document_RS.tolist():
            numbers = [d for d in dict.fromkeys(document_S) if d != PADDING]
            rows.append([(int(batch.document_id_D[d]), visit[d]) for d in numbers])
    return rows


def all_windows(source):
    windows = []
    while (window := source.next_window()) is not None:
        windows.append(window)
    return windows


def visits_of(windows):
    return Counter(visit for window in windows for row in rows_of(window) for visit in row)


@pytest.mark.parametrize("unit", [None, 8])
def test_whole_documents_cost_what_they_take_with_their_fill(source, examples, unit):
    """Rows are packed by lengths alone: with full attention a document, filled to a multiple of the unit, and no clean
    stream."""
    windows = all_windows(source(block_size=WHOLE, fill_unit=unit, max_epochs=1))
    batches = [batch for window in windows for batch in window]
    assert sum(len(batch.document_id_D) for batch in batches) == len(examples)
    lengths = examples.length_E + -examples.length_E % (unit or 1)
    assert sum(batch.num_tokens for batch in batches) == lengths.sum()
    assert all((batch.view_RS[batch.document_RS != PADDING] == 1).all() for batch in batches)
    fill = sum(int((batch.response_length_D - batch.answer_length_D).sum()) for batch in batches)
    assert fill == np.maximum(lengths - examples.length_E - 1, 0).sum()  # the first EOS ends the answer


def test_an_epoch_sees_every_document_once(source, examples):
    expected = {(int(d), visit): 1 for d in examples.document_id_E for visit in (0, 1)}
    assert visits_of(all_windows(source())) == expected
    assert visits_of(all_windows(source(packing=False))) == expected


def test_epochs_and_seeds_differ_in_order(source):
    def order(**changes):
        return [row[0] for window in all_windows(source(packing=False, **changes)) for row in rows_of(window)]

    both = order()
    assert [d for d, _ in both[:42]] != [d for d, _ in both[42:]]
    assert [visit for _, visit in both] == [0] * 42 + [1] * 42
    assert order() == both
    assert order(seed=4) != both


def test_a_batch_has_the_weights_of_its_records(write):
    """In the order of its documents; none where all of them are 1."""
    rows = [{"input_ids": [30] * 8, "prompt_lengths": 2} | ({"weight": 3.5} if i == 4 else {}) for i in range(12)]
    examples = load_examples(
        [DatasetKeys(write(*rows))], None, max_length=20, overlong="refuse", on_bad_row="error",
        max_bad_fraction=0.0, block_size=BLOCK, eos_id=EOS, vocab_size=64,
    )  # fmt: skip
    options = {"num_views": 1, "block_size": BLOCK, "eos_id": EOS, "row_length": 36, "seed": 3, "max_epochs": 1}
    batches = [batch for window in all_windows(RecordSource(examples, [1], one_view, **options)) for batch in window]
    found = [batch.columns["weight_D"] for batch in batches if "weight_D" in batch.columns]
    assert len(found) == 1 < len(batches)
    (weighed,) = (batch for batch in batches if "weight_D" in batch.columns)
    assert found[0].tolist() == [3.5 if number == 5 else 1.0 for number in weighed.document_id_D.tolist()]


def test_rows_are_full_and_padded_to_the_row_length(source):
    windows = all_windows(source(max_epochs=40, row_length=200))
    assert {tuple(batch.input_ids_RS.shape) for window in windows for batch in window} == {(1, 200)}
    filled = sum(batch.num_tokens for window in windows for batch in window)
    assert filled / (200 * len(windows)) > 0.95


def test_without_packing_a_row_is_as_long_as_its_document(source):
    widths = {batch.input_ids_RS.shape[1] for window in all_windows(source(packing=False)) for batch in window}
    assert len(widths) > 3
    assert max(widths) < 48


SPLITS = [(1, 8, 1), (8, 1, 1), (2, 2, 2), (1, 1, 8), (4, 1, 2)]
PHASES = [(0, 1), (1, 2), (2, 64), (3, BLOCK)]  # (first window, block size); no document has 64 tokens
SCHEDULES = pytest.mark.parametrize("phases", [None, PHASES])


@SCHEDULES
@pytest.mark.parametrize("world_size, accumulation, micro_batch_rows", SPLITS)
def test_a_window_holds_the_same_rows_however_it_is_split(source, world_size, accumulation, micro_batch_rows, phases):
    expected = [rows_of(window) for window in all_windows(source(accumulation=8, block_phases=phases))]
    split = {"world_size": world_size, "accumulation": accumulation, "micro_batch_rows": micro_batch_rows}
    split["block_phases"] = phases
    ranks = [all_windows(source(rank=rank, **split)) for rank in range(world_size)]
    assert all(len(window) == accumulation for windows in ranks for window in windows)
    assert len({len(windows) for windows in ranks}) == 1
    for number, rows in enumerate(expected):
        dealt = [row for windows in ranks for row in rows_of(windows[number])]
        assert sorted(dealt) == sorted(rows)


@SCHEDULES
def test_windows_by_tokens(source, examples, phases):
    """A window ends with the row that brings it to the tokens, on any number of ranks, and its forecast is exact."""
    tokens = dict(zip(examples.document_id_E.tolist(), examples.trainable_U.tolist(), strict=True))
    options = {"window_tokens": 40, "block_phases": phases}
    alone = source(**options)
    windows = all_windows(alone)
    assert len(windows) == source(**options).num_windows > 5
    assert all(len(window) == len(rows_of(window)) for window in windows)  # micro-batches of one row, none empty
    for number, window in enumerate(windows):
        found = [sum(tokens[document] for document, _ in row) for row in rows_of(window)]
        assert sum(found[:-1]) < 40
        assert sum(found) >= 40 or number == len(windows) - 1
    for world_size, micro_batch_rows in ((2, 1), (3, 2)):
        split = options | {"world_size": world_size, "micro_batch_rows": micro_batch_rows}
        ranks = [all_windows(source(rank=rank, **split)) for rank in range(world_size)]
        for number, window in enumerate(windows):
            dealt = [row for rank in ranks for row in rows_of(rank[number])]
            assert sorted(filter(None, dealt)) == sorted(rows_of(window))
            assert len({len(rank[number]) for rank in ranks}) == 1
            assert len(dealt) - len(rows_of(window)) < world_size * micro_batch_rows  # empty ones
    resumed, before = source(**options | {"world_size": 2, "rank": 1}), source(**options)
    for _ in range(3):
        before.next_window()
    resumed.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert resumed.num_windows == len(windows) - 3
    assert rows_of(resumed.next_window()) == [*rows_of(windows[3])[1::2], *[[]] * (len(windows[3]) % 2)]


def test_the_last_window_is_filled_up_with_empty_rows(source):
    split = {"world_size": 8, "accumulation": 2}
    ranks = [all_windows(source(rank=rank, **split)) for rank in range(8)]
    last = [row for windows in ranks for row in rows_of(windows[-1])]
    assert len(last) == 16
    assert [] in last
    assert [] not in [row for windows in ranks for window in windows[:-1] for row in rows_of(window)]
    assert visits_of(window for windows in ranks for window in windows).total() == 84


@SCHEDULES
@pytest.mark.parametrize("max_epochs", [0.25, 1, 2.5])
@pytest.mark.parametrize("packing", [True, False])
def test_num_windows_is_exact(source, max_epochs, packing, phases):
    options = {"max_epochs": max_epochs, "packing": packing, "accumulation": 3, "weights": (0.7, 2.5)}
    options["block_phases"] = phases
    run = source(**options)
    expected = run.num_windows
    assert len(all_windows(run)) == expected > 0
    assert source(max_epochs=None).num_windows is None


def test_a_fraction_of_an_epoch(source):
    assert visits_of(all_windows(source(max_epochs=0.5))).total() == 21
    assert visits_of(all_windows(source(max_epochs=1.5))).total() == 63


def test_weights(source, examples):
    """File a at 1/4, file b at 2: over 40 epochs each record of a is drawn about 10 times, each of b 80 times."""
    times = Counter(
        document for document, _ in visits_of(all_windows(source(weights=(0.25, 2), max_epochs=40))).elements()
    )
    in_a = [times[d] for d in examples.document_id_E[:37].tolist()]
    in_b = [times[d] for d in examples.document_id_E[37:].tolist()]
    assert in_b == [80] * 5
    assert abs(sum(in_a) - 370) < 60
    assert len(set(in_a)) > 1


def test_visits_count_up_without_gaps(source):
    """Whatever the weights, the n-th time that a document comes is visit n: no two get the same noise."""
    seen = visits_of(all_windows(source(weights=(0.4, 2.5), max_epochs=6)))
    assert set(seen.values()) == {1}
    for document in {document for document, _ in seen}:
        visits = sorted(visit for d, visit in seen if d == document)
        assert visits == list(range(len(visits)))


def test_epoch_counts_documents_in_rows(source):
    run = source(packing=False, accumulation=6)
    assert run.epoch == 0
    progress = []
    while run.next_window() is not None:
        progress.append(run.epoch)
    assert progress[:7] == pytest.approx([6 / 42, 12 / 42, 18 / 42, 24 / 42, 30 / 42, 36 / 42, 1.0])
    assert progress[-1] == 2.0
    packed = source()
    packed.next_window()
    assert 0 < packed.epoch < 0.2
    all_windows(packed)
    assert packed.epoch == 2.0


@SCHEDULES
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("weights", [(1, 1), (0.6, 1.5)])
def test_resuming_goes_on_bit_for_bit(source, packing, weights, phases):
    """At every window, so at the epoch's edge as well (42 documents, 6 rows a window, one a row without packing), and
    right before, at and after every change of the block size."""
    options = {"packing": packing, "weights": weights, "accumulation": 6, "max_epochs": 3, "block_phases": phases}
    run, states, windows = source(**options), [], []
    while (window := run.next_window()) is not None:
        windows.append(window)
        states.append(json.loads(json.dumps(run.state_dict())))
    for number, state in enumerate(states):
        resumed = source(**options)
        resumed.load_state_dict(state)
        assert resumed.epoch <= 3
        rest = all_windows(resumed)
        assert len(rest) == len(windows) - number - 1
        for window, expected in zip(rest, windows[number + 1 :], strict=True):
            for batch, other in zip(window, expected, strict=True):
                for name, value in vars(batch).items():
                    assert name == "columns" or value.equal(getattr(other, name)), name


@SCHEDULES
def test_resuming_on_another_number_of_ranks(source, phases):
    one = source(accumulation=8, block_phases=phases)
    one.next_window()
    state = one.state_dict()
    expected = [rows_of(window) for window in all_windows(one)]
    ranks = [source(world_size=4, rank=rank, accumulation=2, block_phases=phases) for rank in range(4)]
    for rank in ranks:
        rank.load_state_dict(state)
    windows = [all_windows(rank) for rank in ranks]
    for number, rows in enumerate(expected):
        assert sorted(row for share in windows for row in rows_of(share[number])) == sorted(rows)


def test_a_resumed_source_knows_what_is_left(source):
    run = source(accumulation=3)
    whole = run.num_windows
    run.next_window()
    resumed = source(accumulation=3)
    resumed.load_state_dict(run.state_dict())
    assert resumed.num_windows == whole - 1
    assert resumed.state_dict() == run.state_dict()


@pytest.mark.parametrize("changes", [{"seed": 4}, {"weights": (1, 2)}])
def test_a_cursor_of_another_run_is_refused(source, changes):
    state = source().state_dict()
    with pytest.raises(CheckpointError, match="is now"):
        source(**changes).load_state_dict(state)


def test_a_row_that_cannot_hold_a_document(source):
    with pytest.raises(ConfigError, match=r"row_length 28 cannot hold .*a\.jsonl:\d+, which takes 32"):
        source(row_length=28)


def test_views_are_built_for_this_rank_only(examples):
    built = []

    def counting(document, visit):
        built.append(document.document_id)
        return one_view(document, visit)

    run = RecordSource(
        examples, [1, 1], counting, num_views=1, block_size=BLOCK, eos_id=EOS, row_length=48, world_size=4, rank=2
    )
    assert built == []
    assert run.num_windows is None
    rows = rows_of(run.next_window())
    assert built == [document for document, _ in rows[0]]


# --- a schedule of block sizes ---------------------------------------------------------------------------------------


def streams_of(batch):
    """{document id: (positions of its clean stream, positions of its view, largest block number)} of a batch."""
    found = {}
    for number, document_id in enumerate(batch.document_id_D.tolist()):
        here = batch.document_RS == number
        clean = int((here & (batch.view_RS == 0)).sum())
        found[document_id] = (clean, int(here.sum()) - clean, int(batch.block_RS[here].max()))
    return found


def expected_streams(example, size):
    """The same by the rules: blocks of `size`; a shorter document is one block, filled up to a multiple of BLOCK."""
    unit = min(size, BLOCK)
    size = min(size, -(-len(example) // unit) * unit)
    blocks = -(-len(example) // size)
    first = int(example.trainable_T.argmax()) // size  # of the response; these documents end with it
    return size * (blocks - 1), size * (blocks - first), blocks - 1


def test_documents_follow_the_block_size_of_their_window(source, examples):
    by_id = {example.document_id: example for example in examples}
    sizes = [1, 2, 64, BLOCK, BLOCK]
    for size, window in zip(sizes, all_windows(source(accumulation=8, block_phases=PHASES)), strict=False):
        for batch in window:
            for document_id, streams in streams_of(batch).items():
                assert streams == expected_streams(by_id[document_id], size)
            positions = batch.position_ids_RS[batch.document_RS != PADDING]
            blocks = batch.block_RS[batch.document_RS != PADDING]
            assert torch.equal(blocks, positions // size)


def test_a_block_as_long_as_the_document_needs_no_clean_stream(source):
    windows = all_windows(source(block_phases=[(0, 64), (10**6, BLOCK)]))
    assert all(clean == 0 and last == 0 for window in windows for clean, _, last in streams_of(window[0]).values())
    assert len(windows) < len(all_windows(source()))


@pytest.mark.parametrize("packing", [True, False])
def test_a_change_of_block_size_goes_on_with_the_same_order(source, packing):
    """Every visit of the run once; one document a row, the very sequence of a run without changes."""
    options = {"packing": packing, "accumulation": 3, "max_epochs": 2}
    plain, changed = (all_windows(source(**options, block_phases=phases)) for phases in (None, PHASES))
    assert visits_of(changed) == visits_of(plain)
    if not packing:
        assert [rows_of(window) for window in changed] == [rows_of(window) for window in plain]


def test_waiting_documents_are_packed_at_their_new_cost(source):
    """256 documents wait while the block size goes from 1 to 64, which takes less room: rows are full at once."""
    options = {"max_epochs": 40, "row_length": 200, "accumulation": 2}
    windows = all_windows(source(**options, block_phases=[(0, 1), (5, 64), (10, BLOCK)]))
    full = [sum(batch.num_tokens for batch in window) / 400 for window in windows[:-1]]
    assert min(full[:15]) > 0.97
    documents = [sum(len(batch.document_id_D) for batch in window) for window in windows]
    assert min(documents[5:10]) > 1.1 * max(documents[10:15])


def test_a_row_that_cannot_hold_a_document_of_one_phase(source):
    with pytest.raises(ConfigError, match=r"which takes 33 positions with 1 view\(s\) in blocks of 1"):
        source(row_length=32, block_phases=[(0, 64), (1, 1), (2, BLOCK)])


# --- preference pairs ------------------------------------------------------------------------------------------------


@pytest.fixture
def paired(write):
    """12 pairs with prompts of 1 to 12 tokens and answers of 2 to 7, which differ from their first token on."""

    def make(**changes):
        rows = [
            {
                "prompt_ids": [40 + i] * (1 + i),
                "chosen_ids": [30] * (2 + i % 5),
                "rejected_ids": [31] * (7 - i % 3),
            }
            for i in range(12)
        ]
        pairs = load_examples(
            [DatasetKeys(write(*rows))], None, max_length=20, overlong="refuse", on_bad_row="error",
            max_bad_fraction=0.0, block_size=BLOCK, eos_id=EOS, vocab_size=64, paired=True,
        )  # fmt: skip
        options = {"num_views": 1, "block_size": BLOCK, "eos_id": EOS, "row_length": 56, "max_epochs": 1}
        return RecordSource(pairs, [1], one_view, **{**options, **changes})

    return make


def test_both_sides_of_a_pair_share_the_whole_blocks_of_their_prompt(paired):
    source = paired()
    common_U = source.examples.common_length_U
    assert common_U.tolist() == list(range(1, 13))
    visits = 0
    for window in all_windows(source):
        for batch in window:
            for number in range(0, len(batch.document_id_D), 2):
                index = int(batch.document_id_D[number]) - 1  # lines count from 1
                trunk = batch.document_RS == number + len(batch.document_id_D)
                sides = [batch.document_RS == number + side for side in (0, 1)]
                assert int(trunk.sum()) == (1 + index) // BLOCK * BLOCK
                assert (batch.input_ids_RS[trunk] == 40 + index).all()
                cost = int(trunk.sum()) + sum(int(side.sum()) for side in sides)
                assert cost == source.phases[0].cost_U[index]
                assert [int(batch.response_length_D[number + side]) for side in (0, 1)] == [
                    int(align(source.examples[2 * index + side], BLOCK, EOS).trainable_T.sum()) for side in (0, 1)
                ]
                visits += 1
    assert visits == 12


@pytest.mark.parametrize("size", [1, 2, 64])
def test_costs_of_pairs_hold_for_every_block_size(paired, size):
    source = paired(packing=False, block_phases=[(0, size), (10**6, BLOCK)], row_length=200)
    for window in all_windows(source):
        (batch,) = window
        assert batch.num_tokens == source.phases[0].cost_U[int(batch.document_id_D[0]) - 1]
