"""Replacing an attribute of somebody else's class for a time, and what that tells of models that are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce, wraps
from threading import RLock
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd


class _Replacement:
    """What stands in the place of a function, and calls what the contexts that are open make of that."""

    def __init__(self, before: Callable[..., Any]) -> None:
        self.before = self.now = before
        self.changes: list[Callable[..., Callable[..., None]]] = []
        self.call = wraps(before)(lambda *args, **kwargs: self.now(*args, **kwargs))

    def update(self) -> None:
        self.now = reduce(lambda value, change: change(value), self.changes, self.before)


_REPLACED: dict[int, _Replacement] = {}  # by the ids of their functions
_LOCK = RLock()  # a generator that holds a context may be collected, and end it, while another one begins


@contextmanager
def replaced(owner: object, name: str, change: Callable[..., Callable[..., None]]) -> Iterator[None]:
    """Context in which an attribute is changed; contexts may overlap, as those of several threads do.

    What somebody else puts in its place meanwhile stays there.
    """
    with _LOCK:
        there = getattr(owner, name)
        entry = _REPLACED.get(id(there))
        if entry is None:
            entry = _Replacement(there)
            _REPLACED[id(entry.call)] = entry
            setattr(owner, name, entry.call)
        entry.changes.append(change)
        entry.update()
    try:
        yield
    finally:
        with _LOCK:
            entry.changes.remove(change)
            entry.update()
            # Where somebody else's wraps it, it goes on calling what was there before.
            if not entry.changes and getattr(owner, name) is entry.call:
                setattr(owner, name, entry.before)
                del _REPLACED[id(entry.call)]


@contextmanager
def noting_loaded(note: Callable[[nn.Module], None]) -> Iterator[None]:
    """Context in which a function is called with each module that something else than its constructor fills.

    That is what ``load_state_dict`` fills, and a convolution that is made without data, as transformers makes those
    that it loads.
    """

    def noting(load: Callable[..., None]) -> Callable[..., None]:
        @wraps(load)
        def noted(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
            load(module, state_dict, prefix, *args, **kwargs)
            # Called for each module by load_state_dict, also where the file has nothing of it.
            if any(key.startswith(prefix) for key in state_dict):
                note(module)

        return noted

    def noting_meta(init: Callable[..., None]) -> Callable[..., None]:
        @wraps(init)
        def noted(module: _ConvNd, *args: Any, **kwargs: Any) -> None:
            init(module, *args, **kwargs)
            if module.weight.is_meta:
                note(module)

        return noted

    with replaced(nn.Module, "_load_from_state_dict", noting), replaced(_ConvNd, "__init__", noting_meta):
        yield
