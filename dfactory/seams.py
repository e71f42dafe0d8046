"""Table: what can be added to dFactory by adding a file: its algorithms, model families and decoding rules.

A seam is a package with a Protocol in its base.py and one file for each entry, which adds itself to the package's table. A
package of one's own adds an entry through an entry point in the group `dfactory.<seam>` that names the module or the entry,
without a fork. Nothing else knows the names of the entries: who needs one asks the table.
"""

import difflib
import importlib
import importlib.metadata
import pkgutil
import threading
from types import ModuleType
from typing import Generic, Protocol, TypeVar

from dfactory.errors import ConfigError


class Named(Protocol):
    @property
    def name(self) -> str: ...


Entry = TypeVar("Entry", bound=Named)


class Table(Generic[Entry]):
    """Entries by name. Files of `package` and entry points of `group` are imported when the table is first read."""

    def __init__(self, what: str, package: str, group: str):
        self.what, self.package, self.group = what, package, group
        self._entries: dict[str, Entry] = {}
        self._lock = threading.RLock()
        self._loaded = self._loading = False

    def add(self, entry: Entry) -> Entry:
        """Put an entry into the table. Raises ConfigError if another one has its name."""
        known = self._entries.setdefault(entry.name, entry)
        if known is not entry:
            raise ConfigError(
                f"{self.what} {entry.name} is declared twice, by {_module_of(known)} and {_module_of(entry)}: "
                "rename one of them, or uninstall the package that brings it"
            )
        return entry

    def __getitem__(self, name: str) -> Entry:
        """Raises ConfigError with the nearest name if there is none."""
        entries = self._all()
        if name not in entries:
            near = difflib.get_close_matches(str(name), entries, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{self.what} {name}: it must be one of {', '.join(entries)}{hint}")
        return entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._all()

    def __iter__(self):
        """The entries by name, in the order of the alphabet."""
        return iter(self._all().values())

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._all())

    def _all(self) -> dict[str, Entry]:
        with self._lock:
            if not self._loaded and not self._loading:  # while it loads, files may read the table of their own seam
                self._loading = True
                try:
                    self._load()
                finally:
                    self._loading = False
                self._entries = dict(sorted(self._entries.items()))
                self._loaded = True  # else the next reader meets the same error, not half a table
            return self._entries

    def _load(self) -> None:
        path = importlib.import_module(self.package).__path__
        for module in pkgutil.iter_modules(path, f"{self.package}."):
            importlib.import_module(module.name)
        for point in importlib.metadata.entry_points(group=self.group):
            try:
                loaded = point.load()
            except Exception as problem:  # another package's code may raise anything
                origin = point.dist.name if point.dist else point.value
                raise ConfigError(
                    f"{self.what} {point.name} of the package {origin} cannot be imported ({point.value}): "
                    f"{type(problem).__name__}: {problem}; mend or uninstall that package"
                ) from problem
            if isinstance(loaded, ModuleType):  # it has added its entries
                continue
            if not hasattr(loaded, "name"):
                raise ConfigError(
                    f"{self.what} {point.name} ({point.value}) has no name: let the entry point name an entry of the table, "
                    "or the module that adds it"
                )
            self.add(loaded)


def _module_of(entry: object) -> str:
    """Where an entry is declared. An entry that wraps something says so itself, as `module`."""
    return entry.__module__ if isinstance(entry, type) else getattr(entry, "module", type(entry).__module__)
