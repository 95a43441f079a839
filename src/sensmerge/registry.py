"""One registry for everything that is chosen by name: lazy, open to plug-ins, with a suggestion for a misspelt name."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from typing import Generic, TypeVar, cast

from .errors import RecipeError

T = TypeVar("T")


def suggestion(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to `name`, or None if nothing is close."""
    close = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.6)
    return close[0] if close else None


def unknown_name(kind: str, name: str, known: Iterable[str], *, where: str) -> RecipeError:
    """The error for a name that nothing bears, with the nearest one that something does."""
    names = sorted(known)
    near = suggestion(name, names)
    return RecipeError(
        f"unknown {kind} '{name}'",
        where=where,
        why=f"known: {', '.join(names)}",
        fix=f"did you mean '{near}'?" if near else "choose one of the names above",
    )


class Registry(Generic[T]):
    """Names to objects of one kind, imported on first use.

    `kind` is the word used in messages ("merge method"); `places` maps each built-in name to "module:attribute"; `group` is the
    entry-point group through which other packages add names (`[project.entry-points."sensmerge.methods"]`). A plug-in may not
    take the name of a built-in. Looking up an unknown name raises RecipeError with the nearest known one.
    """

    def __init__(self, kind: str, places: Mapping[str, str], group: str) -> None:
        self.kind = kind
        self._built_in = frozenset(places)
        self._places = dict(places)
        self._group = group
        self._plugins_read = False

    def _read_plugins(self) -> None:
        if self._plugins_read:
            return
        for point in entry_points(group=self._group):
            if point.name in self._built_in:
                raise RecipeError(
                    f"two packages define the {self.kind} '{point.name}'",
                    where=f"entry point {point.value}",
                    why=f"'{point.name}' is already {self._places[point.name]}",
                    fix="rename the entry point, or uninstall one of the packages",
                )
            self._places[point.name] = point.value
        self._plugins_read = True

    def names(self) -> list[str]:
        """All known names, sorted; imports nothing but entry-point metadata."""
        self._read_plugins()
        return sorted(self._places)

    def get(self, name: str, *, where: str) -> T:
        """The object called `name`; `where` is told to the user if there is none (raises RecipeError)."""
        self._read_plugins()
        if name not in self._places:
            raise unknown_name(self.kind, name, self._places, where=where)
        module, _, attribute = self._places[name].partition(":")
        return cast(T, getattr(importlib.import_module(module), attribute))
