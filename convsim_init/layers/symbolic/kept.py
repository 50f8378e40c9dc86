"""Lists, dicts and caches, of a model and outside of it, in which its code may keep values of a symbolic pass."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import _lru_cache_wrapper
from typing import Any

from torch import Tensor, nn

from convsim_init.layers.forward.code import code_in
from convsim_init.layers.forward.copies import CODE, MANY
from convsim_init.layers.forward.isolation import restore_content
from convsim_init.layers.symbolic.symbols import Symbol, tensors_in

NEAR = 2  # levels of nested containers and objects that are searched


@contextmanager
def without_unknown_values(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Context that leaves no unknown value in attributes of modules, or in what the code of the modules names."""
    named = list({id(value): value for value in _named(parts)}.values())
    containers = {id(live): live for value in named for live in _containers(value, NEAR)}.values()
    before = [(live, _content(live)) for live in containers]
    try:
        yield
    finally:
        for live, content in before:
            if _holds_unknown(list(now.values()) if isinstance(now := _content(live), dict) else now):
                restore_content(live, content)
        for cache in (value for value in named if isinstance(value, _lru_cache_wrapper)):
            # A cache refers to the results that it holds, or to a dict of them.
            if _holds_unknown(gc.get_referents(cache), NEAR + 2):
                cache.cache_clear()


def _named(parts: Sequence[nn.Module]) -> Iterator[Any]:
    """The objects that the code of forward passes names, directly or through others, and attributes of the modules."""
    for kind, forward in {(type(part), vars(part).get("forward")) for part in parts}:
        yield from code_in(kind, forward)[1]
    for part in parts:
        yield vars(part)  # a closure, or an object that cannot be copied, may lead the pass to the model itself
        yield from (value for value in vars(part).values() if isinstance(value, _lru_cache_wrapper))


def _containers(value: Any, depth: int) -> Iterator[Any]:
    """The value if it is a list or a dict, the dict of its attributes otherwise, and the containers inside."""
    kind, live = type(value), value
    if not issubclass(kind, (list, dict, *CODE, Tensor)):
        # Not by `vars`, which would run code of the object's own class. Some objects have no attributes.
        with suppress(Exception):
            live = object.__getattribute__(value, "__dict__")
    if issubclass(type(live), (list, dict)) and len(content := _content(live)) < MANY:
        yield live
        for inner in content.values() if isinstance(content, dict) and depth else ():
            yield from _containers(inner, depth - 1)


def _content(live: Any) -> Any:
    """A plain copy of a list or dict, made without code of its own class."""
    if isinstance(live, list):
        return list.copy(live)
    # An OrderedDict has an order of its own, which `dict.copy` does not know.
    return dict(live) if type(live) is OrderedDict else dict.copy(live)


def _holds_unknown(values: Sequence[object], depth: int = NEAR) -> bool:
    return any(isinstance(tensor, Symbol) for tensor in tensors_in(values, depth))
