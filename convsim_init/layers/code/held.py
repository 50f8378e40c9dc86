"""What the attributes of a module hold that is no module of its own: functions, plain objects, lists of parameters."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from functools import cache, partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

FEW = 16  # entries of a list or dict, and plain objects, that are looked at
LIBRARIES = {"torch", *sys.stdlib_module_names}
DEEP = 2  # lists in lists


def held_by(owner: object) -> dict[str, list[object]]:
    """What attributes of a module or object hold, alone or in lists and dicts, and those of plain objects in it."""
    found, spaces = defaultdict[str, list[object]](list), [_attributes(owner)]
    for space in spaces:
        for name, value in space.items():
            if name in _internals() and space is spaces[0]:
                continue
            for one in flat(value):
                found[name].append(one)
                own = _attributes(one) if is_plain(one) else {}
                if own and len(spaces) <= FEW and not any(own is known for known in spaces):
                    spaces.append(own)
    return found


def _attributes(owner: object) -> dict[str, Any]:
    with suppress(Exception):  # its own code may say what they are
        return vars(owner)
    return {}


def flat(value: object, depth: int = DEEP) -> Iterator[object]:
    """A value and what it encloses or is bound to; of a list or dict the first values that it holds."""
    listed = isinstance(value, (list, tuple, set, dict))
    if not (listed or value is None or isinstance(value, (bool, int, float, str))):
        yield value
    for one, _ in zip(_inside(value), range(FEW), strict=False):
        yield from flat(one, depth - 1) if depth else ()


def _inside(value: object) -> Iterator[object]:
    # What a subclass returns might be computed, or import modules.
    if isinstance(value, dict):
        yield from dict.values(value)
    elif isinstance(value, (list, tuple)):
        yield from list.__iter__(value) if isinstance(value, list) else tuple.__iter__(value)
    elif isinstance(value, set):
        yield from set.__iter__(value)
    elif isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        yield value.__self__
    elif isinstance(value, FunctionType):
        yield from (one for _, one in enclosed(value))


def enclosed(function: FunctionType) -> Iterator[tuple[str, object]]:
    """The variables of functions around it that a function uses, and what they hold."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # a cell that is empty yet
            yield name, cell.cell_contents


def is_plain(value: object) -> bool:
    """Whether it is an object of somebody's own class that is no module, such as one that changes modules."""
    kind = type(value)
    known = (nn.Module, type, FunctionType, MethodType, ModuleType, partial, Tensor)
    return not isinstance(value, known) and kind.__dictoffset__ != 0 and not is_librarys(kind)


def is_librarys(what: FunctionType | type) -> bool:
    """Whether it is one of torch's or of Python's own, whose names say nothing of a model."""
    return what.__module__ is None or what.__module__.partition(".")[0] in LIBRARIES


@cache
def _internals() -> set[str]:
    return set(vars(nn.Module()))
