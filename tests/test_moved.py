"""Names that have moved still work for a release, and say where they are now."""

import importlib
import sys

import pytest

import dfactory
from dfactory import noise, packing


@pytest.mark.parametrize(
    "before, now, names",
    [
        ("dfactory.views", noise, ["RandomMask", "masked_view", "state_before"]),
        ("dfactory.data.pack", packing, ["PackedDocument", "align", "collate", "pack_rows"]),
    ],
)
def test_an_old_module_is_the_new_one_with_a_warning(before, now, names, monkeypatch):
    monkeypatch.delitem(sys.modules, before, raising=False)
    with pytest.warns(DeprecationWarning, match=f"{before} is now {now.__name__}: import from there"):
        old = importlib.import_module(before)
    assert all(getattr(old, name) is getattr(now, name) for name in names)


def test_the_package_has_both_names():
    assert dfactory.noise is noise
    assert dfactory.views.RandomMask is noise.RandomMask
