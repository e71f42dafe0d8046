"""Records and rollouts take the same way into batches, and their rows are to the bit those that golden losses came from."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import torch

from dfactory.config.data import DatasetKeys
from dfactory.data.examples import load_examples
from dfactory.data.source import RecordSource
from dfactory.models.registry import load_policy
from dfactory.noise import EditTargets, RandomMask, every_transition
from dfactory.rl.rollouts import ScoredRollout
from dfactory.rl.rows import RolloutRows
from dfactory.types import PADDING, FinishReason, Rollout, ViewBatch

BLOCK, EOS, MASK = 4, 1, 2
MASKS = RandomMask(MASK, 7, low=0.3, high=0.8, num_views=2, complementary=True, stratified=True)
EDITS = EditTargets(MASKS, MASK, np.arange(3, 60), seed=7, edit_share=0.2, keep_share=0.5, num_turns=2)


def digest(batches: list[ViewBatch]) -> str:
    """Of names, types, shapes and numbers of all tensors of the batches, in order."""
    found = hashlib.sha256()
    for batch in batches:
        fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        del fields["left_index_N"], fields["clean_left_index_N"]  # younger than the digests; see test_left_neighbours
        tensors = fields.pop("columns") | fields
        for name, tensor in sorted(tensors.items()):
            found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return found.hexdigest()[:16]


def write_rows(path, pairs: bool):
    rng = np.random.default_rng(4)
    names = {"prompt_ids": 9, "chosen_ids": 14, "rejected_ids": 14} if pairs else {"input_ids": 30}
    with path.open("w") as file:
        for _ in range(25):
            row = {name: rng.integers(3, 60, rng.integers(2, most)).tolist() for name, most in names.items()}
            file.write(json.dumps(row if pairs else row | {"prompt_lengths": len(row["input_ids"]) // 3}) + "\n")
    return path


def records(path, pairs: bool, rank: int, make_views, **options) -> list[ViewBatch]:
    """Two epochs of one of two ranks."""
    examples = load_examples(
        [DatasetKeys(str(path))], None, max_length=32, overlong="refuse", on_bad_row="error", max_bad_fraction=0.0,
        block_size=BLOCK, eos_id=EOS, vocab_size=64, paired=pairs,
    )  # fmt: skip
    source = RecordSource(
        examples, [1.0], make_views, block_size=BLOCK, eos_id=EOS, row_length=512, seed=3, max_epochs=2, rank=rank,
        world_size=2, micro_batch_rows=2, accumulation=2, **options,
    )  # fmt: skip
    windows = []
    while (window := source.next_window()) is not None:
        windows += window
    return windows


@pytest.mark.parametrize(
    "pairs, make_views, options, expected",
    [
        (False, MASKS, {"num_views": 4}, ["fd80fb57d94db258", "78d2dd5ea1b70c4c"]),
        (
            False,
            EDITS,
            {"num_views": 8, "block_phases": [(0, 1), (1, BLOCK)]},
            ["4ebdbd46e6fec123", "da5d4a35a24b1d39"],
        ),
        (False, MASKS, {"num_views": 4, "packing": False}, ["02042ca583397095", "2405b01b818ff769"]),
        (True, MASKS, {"num_views": 4}, ["9ee908c1f82dab72", "0af6dd8b7cb6ad02"]),
    ],
    ids=["masks", "edits and phases", "a document a row", "pairs"],
)
def test_records_make_the_same_rows(tmp_path, pairs, make_views, options, expected):
    path = write_rows(tmp_path / "rows.jsonl", pairs)
    assert [digest(records(path, pairs, rank, make_views, **options)) for rank in range(2)] == expected


def rollouts() -> list[ScoredRollout]:
    """Three groups of six; the responses to a prompt begin alike now and then."""
    rng, made = np.random.default_rng(5), []
    for group in range(3):
        prompt = rng.integers(3, 60, rng.integers(3, 20)).tolist()
        for index in range(6):
            size = BLOCK * int(rng.integers(1, 6)) + -len(prompt) % BLOCK
            ids = rng.integers(3, 5, size).tolist()
            sizes = np.diff([0, *range(-len(prompt) % BLOCK or BLOCK, size, BLOCK), size]).tolist()
            made.append(ScoredRollout(group, index, one_token_a_forward(prompt, ids, sizes), 0.0, float(rng.normal())))
    return made


def one_token_a_forward(prompt: list[int], ids: list[int], sizes: list[int]) -> Rollout:
    steps = list(range(len(ids)))
    return Rollout(
        prompt_ids=prompt, token_ids=ids, commit_step=steps, commit_logprob=[-1.0] * len(ids), first_commit_step=steps,
        edits=[], block_size=BLOCK, block_forwards=sizes, output_ids=ids[:-1], forwards=len(ids),
        finish_reason=FinishReason.LENGTH,
    )  # fmt: skip


def masked(document, index):
    return document, MASKS(document, index)


def traced(document, index):
    return document, every_transition(document, 1, MASK)


@pytest.mark.parametrize(
    "make_views, options, expected",
    [
        (masked, {"row_length": 160}, ["bd5448ac16366907", "fca6c3513889c52a"]),
        (masked, {"row_length": 400, "micro_batch_rows": 2}, ["b3bcd645ad1a75ce", "7d6d3d055677253a"]),
        (traced, {"row_length": 160, "train_after_eos": False}, ["e31ab796a09c3017", "07c6ff2243814606"]),
    ],
    ids=["masks", "long rows", "traces"],
)
def test_rollouts_make_the_same_rows(make_views, options, expected):
    rows = RolloutRows(make_views, BLOCK, world_size=2, **options)
    batches = [rows.build(rollouts(), rank) for rank in range(2)]
    assert [digest(batch) for batch in batches] == expected


@pytest.mark.parametrize("micro_batch_rows", [1, 2])
def test_rows_without_padding_are_the_same_rows(micro_batch_rows):
    """Each micro-batch is as wide as its longest row: nothing but padding is cut off, and scores are the same."""
    policy = load_policy("tiny", dtype="float32", init_weights="random", seed=1)
    rows = RolloutRows(masked, BLOCK, 400, micro_batch_rows=micro_batch_rows)
    whole, cut = rows.build(rollouts()), dataclasses.replace(rows, padded=False).build(rollouts())
    saved = 0
    for wide, narrow in zip(whole, cut, strict=True):
        width = narrow.input_ids_RS.shape[1]
        saved += wide.input_ids_RS.shape[1] - width
        assert (narrow.document_RS[:, -1] != PADDING).any()
        assert (wide.document_RS[:, width:] == PADDING).all()
        for name in ("input_ids_RS", "position_ids_RS", "document_RS", "view_RS", "block_RS", "trunk_RS"):
            assert torch.equal(getattr(wide, name)[:, :width], getattr(narrow, name))
        for name in ("target_ids_N", "t_N", "document_id_D"):
            assert torch.equal(getattr(wide, name), getattr(narrow, name))
        with torch.no_grad():
            torch.testing.assert_close(policy(narrow).logprob_N, policy(wide).logprob_N, rtol=1e-5, atol=1e-5)
    assert saved > 0


def test_a_rank_without_rollouts_has_the_columns_too():
    one, nothing = (RolloutRows(masked, BLOCK, 160, world_size=2).build(rollouts()[:1], rank) for rank in range(2))
    assert sorted(nothing[0].columns) == sorted(one[0].columns)
    assert all(len(column) == 0 for column in nothing[0].columns.values())
    assert {name: nothing[0].columns[name].dtype for name in one[0].columns} == {
        name: column.dtype for name, column in one[0].columns.items()
    }
    assert torch.equal(one[0].columns["rollout_D"], torch.zeros(len(one[0].document_id_D), dtype=torch.int64))
