"""Keys of a seam's entries: combined, and refused where another entry is selected."""

import dataclasses

import pytest

from dfactory.config.keys import key
from dfactory.config.owners import combine, either, refuse_foreign
from dfactory.errors import ConfigError


@dataclasses.dataclass
class Shared:
    share: float = key(0.5, "of both")


@dataclasses.dataclass
class OneKeys(Shared):
    alone: int = key(1, "of one")


@dataclasses.dataclass
class ThirdKeys:
    share: float = key(0.1, "declared apart")


@dataclasses.dataclass
class Entry:
    name: str
    Keys: type

    wide_selector: str = "rule all"

    @property
    def selector(self):
        return f"rule {self.name}"


ENTRIES = [Entry("one", OneKeys), Entry("two", Shared)]


def test_keys_of_all_entries_are_one_flat_dataclass():
    keys = combine("Keys", ENTRIES, __name__)()
    assert dataclasses.asdict(keys) == {"share": 0.5, "alone": 1}
    assert dataclasses.fields(keys)[1].metadata["help"] == "of one"


def test_a_key_that_two_entries_declare_apart_is_refused():
    with pytest.raises(ConfigError, match=r"key share is declared by .*: let both inherit it"):
        combine("Keys", [*ENTRIES, Entry("three", ThirdKeys)], __name__)


def test_a_foreign_key_is_refused_by_the_name_of_its_owner():
    keys = combine("Keys", ENTRIES, __name__)(share=0.7, alone=2)
    given = {"d.share": "x.yaml", "d.alone": "the command line"}
    with pytest.raises(ConfigError, match=r"d\.alone in the command line belongs to rule one, and this is rule two"):
        refuse_foreign(keys, given, ENTRIES, ENTRIES[1], "d.")
    refuse_foreign(keys, given, ENTRIES, ENTRIES[0], "d.")


def test_entries_that_are_all_there_have_their_wide_selector():
    others = [*ENTRIES, Entry("three", ThirdKeys, "kind of its own")]
    assert either(ENTRIES, others) == "rule all"
    assert either([ENTRIES[0], others[2]], others) == "rule one or kind of its own"
    assert either(ENTRIES[:1], ENTRIES) == "rule one"


def test_a_foreign_key_at_its_default_is_let_pass():
    """The resolved recipe in a run folder holds every key."""
    keys = combine("Keys", ENTRIES, __name__)(alone=1)
    refuse_foreign(keys, {"alone": "config.yaml"}, ENTRIES, ENTRIES[1])
