"""Observing calls of somebody else's functions for a time, and what that tells of models that are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from threading import RLock
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

Act = Callable[..., object]  # called with the arguments of the function that is observed


def nothing(*_: object, **__: object) -> None:
    """Do nothing."""


class _Replacement:
    """What stands in the place of a function, and tells the contexts that are open of its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.observers: list[tuple[Act, Act]] = []

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            observers = self.observers.copy()  # a context may begin or end within the call
            for before, _ in reversed(observers):
                before(*args, **kwargs)
            result = function(*args, **kwargs)
            for _, after in observers:
                after(*args, **kwargs)
            return result

        self.call = call


_REPLACED: dict[int, _Replacement] = {}  # by the ids of their functions
_LOCK = RLock()  # a generator that holds a context may be collected, and end it, while another one begins


@contextmanager
def observed(owner: object, name: str, *, before: Act = nothing, after: Act = nothing) -> Iterator[None]:
    """Context in which others are called before and after a function; contexts may overlap, as of several threads.

    What somebody else puts in its place meanwhile stays there.
    """
    observer = (before, after)
    with _LOCK:
        there = getattr(owner, name)
        entry = _REPLACED.get(id(there))
        if entry is None:
            entry = _Replacement(there)
            _REPLACED[id(entry.call)] = entry
            setattr(owner, name, entry.call)
        entry.observers.append(observer)
    try:
        yield
    finally:
        with _LOCK:
            entry.observers.remove(observer)
            # Where somebody else's wraps it, it goes on calling what was there before.
            if not entry.observers and getattr(owner, name) is entry.call:
                setattr(owner, name, entry.function)
                del _REPLACED[id(entry.call)]


@contextmanager
def noting_loaded(note: Callable[[nn.Module], None]) -> Iterator[None]:
    """Context in which a function is called with each module that something else than its constructor fills.

    That is what ``load_state_dict`` fills, and a convolution that is made without data, as transformers makes those
    that it loads.
    """

    def note_loaded(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object, **__: object) -> None:
        # Called for each module by load_state_dict, also where the file has nothing of it.
        if any(key.startswith(prefix) for key in state_dict):
            note(module)

    def note_meta(module: _ConvNd, /, *_: object, **__: object) -> None:
        if module.weight.is_meta:
            note(module)

    with (
        observed(nn.Module, "_load_from_state_dict", after=note_loaded),
        observed(_ConvNd, "__init__", after=note_meta),
    ):
        yield
