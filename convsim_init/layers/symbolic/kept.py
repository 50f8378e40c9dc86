"""What code keeps outside of a model, in lists, dicts and caches that it names, across a pass on unknown values."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import _lru_cache_wrapper
from typing import Any

from torch import Tensor, nn

from convsim_init.layers.forward.copies import CODE, MANY, code_in
from convsim_init.layers.forward.isolation import restore_content
from convsim_init.layers.symbolic.symbols import Symbol, tensors_in

NEAR = 2  # containers and objects within each other that are looked into


@contextmanager
def without_unknown_values(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Context after which no list, dict or cache that the code of modules names holds unknown values of it."""
    known = list({id(one): one for one in _named(parts)}.values())
    held = {id(one): one for value in known for one in _containers(value, NEAR)}.values()
    before = [(one, _content(one)) for one in held]
    try:
        yield
    finally:
        for live, content in before:
            if _holds_unknown(list(now.values()) if isinstance(now := _content(live), dict) else now):
                restore_content(live, content)
        for cache in (one for one in known if isinstance(one, _lru_cache_wrapper)):
            if _holds_unknown(gc.get_referents(cache), NEAR + 2):  # what was returned, or a dict of it
                cache.cache_clear()


def _named(parts: Sequence[nn.Module]) -> Iterator[Any]:
    """What the code of forward passes, and that of what it names, knows by its names, or as attributes of classes."""
    for kind, forward in {(type(part), vars(part).get("forward")) for part in parts}:
        yield from code_in(kind, forward)[1]
    for part in parts:
        yield from (one for one in vars(part).values() if isinstance(one, _lru_cache_wrapper))


def _containers(value: Any, depth: int) -> Iterator[Any]:
    """The lists and dicts that a value is or holds, also in attributes."""
    kind, live = type(value), value
    if not issubclass(kind, (list, dict, *CODE, Tensor)):
        with suppress(Exception):  # of objects without attributes; code of theirs that tells of others is not run
            live = object.__getattribute__(value, "__dict__")
    if issubclass(type(live), (list, dict)) and len(content := _content(live)) < MANY:
        yield live
        for one in content.values() if isinstance(content, dict) and depth else ():
            yield from _containers(one, depth - 1)


def _content(live: Any) -> Any:
    """What a list or dict holds, by no code of its own."""
    if isinstance(live, list):
        return list.copy(live)
    return dict(live) if type(live) is OrderedDict else dict.copy(live)  # which knows no other order


def _holds_unknown(values: Sequence[object], depth: int = NEAR) -> bool:
    return any(isinstance(one, Symbol) for one in tensors_in(values, depth))
