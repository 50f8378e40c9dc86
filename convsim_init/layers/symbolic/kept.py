"""What code keeps outside of a model, in lists, dicts and caches that it names, across a pass on unknown values."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import _lru_cache_wrapper
from typing import Any

from torch import nn

from convsim_init.layers.forward.copies import NEAR, containers_in, content_of, known_to
from convsim_init.layers.forward.isolation import put_content_back
from convsim_init.layers.symbolic.symbols import Symbol, tensors_in


@contextmanager
def without_unknown_values(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Context after which no list, dict or cache that the code of modules names holds unknown values of it."""
    known = list({id(one): one for one in _named(parts)}.values())
    held = {id(one): one for value in known for one in containers_in(value, NEAR)}.values()
    before = [(one, content_of(one)) for one in held]
    try:
        yield
    finally:
        for live, content in before:
            if _holds_unknown(list(now.values()) if isinstance(now := content_of(live), dict) else now):
                put_content_back(live, content)
        for cache in (one for one in known if isinstance(one, _lru_cache_wrapper)):
            if _holds_unknown(gc.get_referents(cache), NEAR + 2):  # what was returned, or a dict of it
                cache.cache_clear()


def _named(parts: Sequence[nn.Module]) -> Iterator[Any]:
    """What the code of forward passes, and that of what it names, knows by its names, or as attributes of classes."""
    for kind, forward in {(type(part), vars(part).get("forward")) for part in parts}:
        yield from known_to(kind, forward)
    for part in parts:
        yield from (one for one in vars(part).values() if isinstance(one, _lru_cache_wrapper))


def _holds_unknown(values: Sequence[object], depth: int = NEAR) -> bool:
    return any(isinstance(one, Symbol) for one in tensors_in(values, depth))
