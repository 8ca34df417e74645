"""Tables of what a setting can name: attentions, models, tasks. An entry is imported when it is asked for."""

import difflib
import importlib
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from lin_jax.settings.base import ConfigError

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """Entries by name, each a class with its settings, `entry.settings`, beside it.

    Attributes:
        what: what an entry is, for messages.
        field: the field of an entry's settings that holds its name, such as `kind`.
    """

    def __init__(self, what: str, field: str, homes: Mapping[str, str]):
        """Make a table of entries that are imported when they are asked for, `module:attribute` each."""
        self.what, self.field = what, field
        self._homes, self._entries = dict(homes), dict[str, Entry]()

    def register(self, name: str, entry: Entry) -> None:
        """Add an entry that another package brings.

        Raises:
            ValueError: the name is taken.
        """
        if name in self:
            raise ValueError(f"there is a {self.what} {name!r} already")
        self._entries[name] = entry

    def __getitem__(self, name: str) -> Entry:
        """Return the entry of a name; raises `ConfigError` where there is none."""
        if name not in self:
            near = difflib.get_close_matches(name, list(self), n=1)
            told = f"did you mean {near[0]}?" if near else f"there are {', '.join(self)}"
            raise ConfigError(f"unknown {self.what} {name!r}; {told}")
        if name not in self._entries:
            module, _, attribute = self._homes[name].partition(":")
            self._entries[name] = getattr(importlib.import_module(module), attribute)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._homes or name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._homes, *self._entries]))
