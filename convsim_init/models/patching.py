"""Replacing an attribute of somebody else's class for a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Any


@dataclass(eq=False)
class _Replacement:
    """An attribute that contexts replace, and what was there before the first of them."""

    owner: object
    name: str
    before: Any
    below: _Replacement | None  # somebody else has replaced the attribute in between
    changes: list[Callable[..., Callable[..., None]]] = field(default_factory=list)
    installed: Any = None

    def install(self) -> None:
        self.installed = reduce(lambda value, change: change(value), self.changes, self.before)
        setattr(self.owner, self.name, self.installed)


_REPLACED: dict[tuple[object, str], _Replacement] = {}


@contextmanager
def replaced(owner: object, name: str, change: Callable[..., Callable[..., None]]) -> Iterator[None]:
    """Context in which an attribute is changed; contexts may overlap, as those of several threads do."""
    now, entry = getattr(owner, name), _REPLACED.get((owner, name))
    if entry is None or now is not entry.installed:
        entry = _REPLACED[owner, name] = _Replacement(owner, name, now, entry)
    entry.changes.append(change)
    entry.install()
    try:
        yield
    finally:
        entry.changes.remove(change)
        entry.install()
        if not entry.changes and _REPLACED.get((owner, name)) is entry:
            del _REPLACED[owner, name]
            if entry.below is not None:
                _REPLACED[owner, name] = entry.below
