"""Columns of a batch: what may be added, of which type and shape, and that the table and the code name the same ones."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from dfactory import columns
from dfactory.columns import Column, column_of, register
from dfactory.packing import PackedDocument, collate
from dfactory.types import AlignedDocument, View

ROOT = Path(__file__).parents[2]
USED = re.compile(r"""batch\.columns(?:\[|\.get\()f?"([\w{}]+)""")


def document(columns_D=None, columns_P=None) -> PackedDocument:
    """Two response tokens in one block; the first is a target."""
    aligned = AlignedDocument(7, np.array([5, 6], np.int32), np.array([True, True]), 2)
    t_P = np.full(2, 0.5, np.float32)
    view = View(
        np.arange(2, dtype=np.int32), np.array([2, 6], np.int32), np.array([True, False]), t_P, t_P, columns_P or {}
    )
    return PackedDocument(aligned, [view], 0, columns_D or {})


BATCH = collate([[document(), document()]], 2)  # [R, S] = [1, 4], two documents, two targets


@pytest.mark.parametrize(
    "name, values, message",
    [
        ("advantage_D", torch.zeros(2), None),
        ("fresh_N", torch.zeros(2, dtype=torch.bool), None),
        ("embedding_noise_row_RS", torch.zeros(1, 4, dtype=torch.int64), None),
        ("embedding_noise_std_1", torch.zeros(1), None),
        ("coefficient_any term_N", torch.zeros(2), None),
        ("advantages_D", torch.zeros(2), "no column advantages_D: did you mean advantage_D?"),
        ("mine_D", torch.zeros(2), "no column mine_D: add it with dfactory.columns.register"),
        ("advantage_D", torch.zeros(2, dtype=torch.float64), "advantage_D is torch.float64, but rl/rows.py declares"),
        ("advantage_D", torch.zeros(3), r"advantage_D has shape \[3\], but _D is \[2\] in this batch"),
        ("embedding_noise_row_RS", torch.zeros(4, dtype=torch.int64), r"shape \[4\], but _RS is \[1, 4\]"),
    ],
)
def test_a_batch_takes_what_the_table_lists(name, values, message):
    if message is None:
        assert BATCH.with_columns(**{name: values}).columns[name] is values
        return
    with pytest.raises(ValueError, match=message):
        BATCH.with_columns(**{name: values})


def test_a_package_registers_its_own(monkeypatch):
    monkeypatch.setattr(columns, "_COLUMNS", dict(columns._COLUMNS))
    value = register(Column("value_N", torch.float32, "mine/critic.py", "the critic's value"))
    assert register(value) is value, "a module may be imported twice"
    assert column_of("value_N").shape == "N"
    assert "value_N" in BATCH.with_columns(value_N=torch.zeros(2)).columns
    with pytest.raises(ValueError, match=r"value_N of other\.py belongs to mine/critic\.py already: rename it"):
        register(value._replace(owner="other.py"))
    with pytest.raises(ValueError, match="column value ends in none of _N, _D, _RS, _1"):
        register(value._replace(name="value"))


def test_documents_and_views_bring_columns():
    rows = [[document({"rollout_D": n, "advantage_D": n / 2}, {"drafted": np.array([n > 0, False])}) for n in range(2)]]
    batch = collate(rows, 2, columns=("rollout_D",))
    assert batch.columns["rollout_D"].tolist() == [0, 1]
    assert batch.columns["rollout_D"].dtype is torch.int64
    assert batch.columns["advantage_D"].tolist() == [0, 0.5]
    assert batch.columns["drafted_N"].tolist() == [False, True]
    empty = collate([[]], 2, columns=("rollout_D",))
    assert empty.columns["rollout_D"].dtype is torch.int64
    assert empty.columns["rollout_D"].numel() == 0
    with pytest.raises(ValueError, match="column rollout_D: 1 of 2 documents have it; give it to all"):
        collate([[document({"rollout_D": 0}), document()]], 2)
    with pytest.raises(ValueError, match="column drafted_N: 1 of 2 views have it; give it to all"):
        collate([[document(None, {"drafted": np.array([True, False])}), document()]], 2)


def test_the_table_names_what_the_code_names():
    """Every column that a file of the package reads by name is in the table, and its owner mentions it."""
    for file in sorted((ROOT / "dfactory").rglob("*.py")):
        for name in USED.findall(file.read_text()):
            column_of(re.sub(r"\{\w+\}", "term", name))
    for column in columns.columns():
        stem = column.name.rpartition("_")[0].partition("*")[0]
        assert stem in (ROOT / "dfactory" / column.owner).read_text(), column


def test_the_page_lists_the_table():
    page = (ROOT / "docs/extending.md").read_text()
    rows = [
        f"| `{c.name}` | {str(c.dtype).removeprefix('torch.')} | `{c.owner}` | {c.meaning} |" for c in columns.columns()
    ]
    assert "\n".join(["|---|---|---|---|", *rows]) in page
