"""The names in the code of forward passes and hooks, which say what these may use and change."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from inspect import getattr_static
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

LIBRARIES = {"torch", *sys.stdlib_module_names}
HOOKS = ("_forward_pre_hooks", "_forward_hooks")
# Names in the code of a hook that may change weights.
CHANGING = {"weight", "data", "parameters", "named_parameters", "_parameters"}
CHANGING |= {"state_dict", "load_state_dict", "setattr"}


def names_of(parts: Iterable[nn.Module]) -> set[str]:
    """The names in the code of forward passes, and in the methods and functions that this code names."""
    code = {(type(part), vars(part).get("forward")) for part in parts}
    return set().union(*(names_in(kind, forward) for kind, forward in code))


def names_in(kind: Any, code: Any = None) -> set[str]:
    """The names in the code that `code_in` finds, and the strings in it."""
    codes, _ = code_in(kind, code)
    # A string may name an attribute: `getattr(self, "scale")`.
    consts = ({const for const in inner.co_consts if isinstance(const, str)} for inner in codes)
    return set().union(*(inner.co_names for inner in codes), *consts)


def code_in(kind: Any, code: Any = None) -> tuple[list[CodeType], list[Any]]:
    """The code of a class's forward pass, or of a function, and of all functions it leads to; and all objects named."""
    named: list[Any] = [code or getattr(kind, "forward", None), getattr_static(kind, "__call__", None)]
    found = dict[CodeType, None]()
    for value in named:  # grows in the loop
        function = inspect.unwrap(getattr(value, "__func__", getattr(value, "fget", value)))
        own = getattr(function, "__code__", None)
        codes = list(codes_in(own)) if isinstance(own, CodeType) and not is_from_library(function) else []
        # Functions may call themselves and each other, so each is looked at once.
        codes = codes if found.keys().isdisjoint(codes[:1]) else []
        found |= dict.fromkeys(codes)
        for cell in function.__closure__ or () if codes else ():
            with suppress(ValueError):  # raised by a cell that is still empty
                named.append(cell.cell_contents)
        for inner in codes:
            named += [getattr_static(kind, name, None) for name in inner.co_names]
            named += [function.__globals__.get(name) for name in inner.co_names]
    return list(found), named


def codes_in(code: CodeType) -> Iterator[CodeType]:
    """The code of a function, and that of the functions defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_in(constant)


def may_change(hook: Any) -> bool:
    """Whether a hook names anything that changes weights. Others after a forward pass, such as logs, are left out."""
    bare = hook.func if isinstance(hook, partial) else hook
    kind = type(bare.__self__) if isinstance(bare, MethodType) else type(bare)
    names = names_in(kind, bare if isinstance(bare, (FunctionType, MethodType)) else None)
    return not names.isdisjoint(CHANGING) or any(name.endswith("_") and not name.startswith("_") for name in names)


def is_from_library(what: FunctionType | type) -> bool:
    """Whether a function or class belongs to torch or Python itself, so that its names say nothing of a model."""
    return what.__module__ is None or what.__module__.partition(".")[0] in LIBRARIES
