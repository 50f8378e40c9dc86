"""What code keeps outside of a model, in lists, dicts and caches that it names, across a pass on unknown values."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import _lru_cache_wrapper
from typing import Any

from torch import Tensor, nn

from convsim_init.layers.forward.copies import CODE, MANY, code_in
from convsim_init.layers.forward.isolation import put_content_back
from convsim_init.layers.symbolic.symbols import Symbol, tensors_in

NEAR = 2  # containers and objects within each other that are looked into


@contextmanager
def without_unknown_values(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Context after which no list, dict or cache that the code of modules names holds unknown values of it."""
    known = list({id(one): one for one in _named(parts)}.values())
    held = {id(one): one for value in known for one in _containers(value, NEAR)}.values()
    before = [(one, list(one) if isinstance(one, list) else dict(one)) for one in held]
    try:
        yield
    finally:
        for live, content in before:
            if _holds_unknown(list(live.values()) if isinstance(live, dict) else live):
                put_content_back(live, content)
        for cache in (one for one in known if isinstance(one, _lru_cache_wrapper)):
            if _holds_unknown(gc.get_referents(cache)):  # what was returned is among them
                cache.cache_clear()


def _named(parts: Sequence[nn.Module]) -> Iterator[Any]:
    """What the code of forward passes, and that of what it names, knows by global names or as attributes of classes."""
    for kind, forward in {(type(part), vars(part).get("forward")) for part in parts}:
        for function, code in code_in(kind, forward):
            for name in code.co_names:
                yield from (function.__globals__.get(name), vars(kind).get(name))
    for part in parts:
        yield from (one for one in vars(part).values() if isinstance(one, _lru_cache_wrapper))


def _containers(value: Any, depth: int) -> Iterator[Any]:
    """The lists and dicts that a value is or holds, also in attributes."""
    content: Any = ()
    with suppress(Exception):  # of objects without attributes, or whose own code says what they have
        content = (
            value if isinstance(value, (dict, list)) else () if isinstance(value, (*CODE, Tensor)) else vars(value)
        )
    if isinstance(content, (dict, list)) and len(content) < MANY:
        yield content
        for one in list(content.values()) if isinstance(content, dict) and depth else ():
            yield from _containers(one, depth - 1)


def _holds_unknown(values: Sequence[object]) -> bool:
    return any(isinstance(one, Symbol) for one in tensors_in(values, NEAR))
