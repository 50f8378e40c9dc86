"""Replacing an attribute of somebody else's class for a time, and what that tells of models that are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce, wraps
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd


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
        # The changes that are left wrap the attribute anew: contexts may end in any order.
        entry.changes.remove(change)
        entry.install()
        if not entry.changes and _REPLACED.get((owner, name)) is entry:
            del _REPLACED[owner, name]
            if entry.below is not None:
                _REPLACED[owner, name] = entry.below


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
