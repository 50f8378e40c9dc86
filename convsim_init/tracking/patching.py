"""Observing calls of other people's functions for a time, such as those that load models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from threading import RLock
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

Observer = Callable[..., object]  # called with the arguments of the observed function


def ignore(*_: object, **__: object) -> None:
    """Do nothing."""


class _Replacement:
    """Replacement of a function that calls the observers of the open contexts before and after it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.observers: list[tuple[Observer, Observer]] = []

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            observers = self.observers.copy()  # a context may begin or end during the call
            for before, _ in reversed(observers):
                before(*args, **kwargs)
            result = function(*args, **kwargs)
            for _, after in observers:
                after(*args, **kwargs)
            return result

        self.call = call


_replacements: dict[int, _Replacement] = {}  # by the ids of their `call`
_lock = RLock()  # reentrant: a garbage collection while a context begins may end one that a generator holds


@contextmanager
def observed(owner: object, name: str, *, before: Observer = ignore, after: Observer = ignore) -> Iterator[None]:
    """Context in which observers are called before and after a function; contexts may overlap, as in several threads.

    If other code replaces the function meanwhile, its replacement stays.
    """
    observers = (before, after)
    with _lock:
        function = getattr(owner, name)
        replacement = _replacements.get(id(function))
        if replacement is None:
            replacement = _Replacement(function)
            _replacements[id(replacement.call)] = replacement
            setattr(owner, name, replacement.call)
        replacement.observers.append(observers)
    try:
        yield
    finally:
        with _lock:
            replacement.observers.remove(observers)
            # A replacement that other code has wrapped stays, and only calls the function.
            if not replacement.observers and getattr(owner, name) is replacement.call:
                setattr(owner, name, replacement.function)
                del _replacements[id(replacement.call)]


@contextmanager
def noting_loaded(note: Callable[[nn.Module], None]) -> Iterator[None]:
    """Context in which a function is called with each module that is filled by something else than its constructor.

    These are the modules that ``load_state_dict`` fills, and convolutions that are built without data, as transformers
    builds those that it loads.
    """

    def note_loaded(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object, **__: object) -> None:
        # load_state_dict calls this for each module, even if the state dict has no entry of it.
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
