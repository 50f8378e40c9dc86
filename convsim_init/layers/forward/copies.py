"""Copies of what the attributes of modules hold, as far as it can be copied and is not too heavy."""

from __future__ import annotations

import copy
import inspect
import sys
from collections import ChainMap, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from inspect import getattr_static
from itertools import chain
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ORIGINAL = "_copied_from"  # an attribute of a parameter's copy: the id of what it is a copy of
LIBRARIES = {"torch", *sys.stdlib_module_names}
ATOMS = (bool, int, float, str, type(None))
CODE = (nn.Module, type, FunctionType, MethodType, ModuleType)  # is not looked through
CONTAINERS = (tuple, list, set, dict, OrderedDict)
HEAVY, MANY = 2**27, 10**5  # bytes of tensors, and objects, that are not copied for a trial


def heavy_attributes(part: nn.Module, parts: Sequence[nn.Module]) -> set[str]:
    """Attributes of a module that no forward pass of the parts names and a copy of which might fill the memory.

    Such as a trainer, or a data set.
    """
    found = {name for name, value in vars(part).items() if is_heavy(value)}
    return found - names_of(parts) if found else found


def names_of(parts: Iterable[nn.Module]) -> set[str]:
    """The names in the code of forward passes, and in that of the methods and functions that these name."""
    code = {(type(part), vars(part).get("forward")) for part in parts}
    return set().union(*(names_in(kind, forward) for kind, forward in code))


def names_in(kind: Any, code: Any = None) -> set[str]:
    """The names in the code of a function, or of the forward pass of a class, and in that of what these name."""
    codes, _ = code_in(kind, code)
    # The strings too, as an attribute may be named by one: `getattr(self, "scale")`.
    consts = ({one for one in inner.co_consts if isinstance(one, str)} for inner in codes)
    return set().union(*(inner.co_names for inner in codes), *consts)


def code_in(kind: Any, code: Any = None) -> tuple[list[CodeType], list[Any]]:
    """The code of a function, or of a class's forward pass, and of what these name; and all that is named."""
    named: list[Any] = [code or getattr(kind, "forward", None), getattr_static(kind, "__call__", None)]
    found = dict[CodeType, None]()
    for one in named:
        function = inspect.unwrap(getattr(one, "__func__", getattr(one, "fget", one)))
        own = getattr(function, "__code__", None)
        codes = list(codes_in(own)) if isinstance(own, CodeType) and not is_librarys(function) else []
        # Functions call themselves and each other: the same ones would come back for ever.
        codes = codes if found.keys().isdisjoint(codes[:1]) else []
        found |= dict.fromkeys(codes)
        for cell in function.__closure__ or () if codes else ():
            with suppress(ValueError):  # empty yet
                named.append(cell.cell_contents)
        for inner in codes:
            named += [getattr_static(kind, name, None) for name in inner.co_names]
            named += [function.__globals__.get(name) for name in inner.co_names]
    return list(found), named


def codes_in(code: CodeType) -> Iterator[CodeType]:
    """The code of a function, and that of those within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_in(constant)


def is_heavy(value: object, *, tensors: bool = True) -> bool:
    """Whether an object leads to many others or to large tensors, where those count, and arrays."""
    if isinstance(value, (*ATOMS, Tensor, dict, list, tuple, set)):
        return False
    size, known, pending = 0, set[int](), list[object]([value])
    for one in pending:
        if id(one) in known:
            continue
        known.add(id(one))
        with suppress(Exception):  # its own code may say what it holds
            if isinstance(one, Tensor):
                size += one.nbytes if tensors and one.layout is torch.strided else 0
            elif isinstance(one, np.ndarray):
                size += one.nbytes
            elif isinstance(one, dict) or not isinstance(one, Mapping):  # others may load what they hold
                pending += one if isinstance(one, deque) else inside(one)
        if size > HEAVY or len(pending) > MANY:
            return True
    return False


def inside(value: object) -> Iterable[object]:
    """What an object holds that is a container or of somebody's own class."""
    with suppress(Exception):  # its own code may say what it holds
        if isinstance(value, slice):
            return value.start, value.stop, value.step
        if isinstance(value, Mapping):
            return list(value.values())
        if isinstance(value, (list, tuple, set)):
            return list(value)
        return () if isinstance(value, CODE) else list(vars(value).values())
    return ()


def copied(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of an attribute, but for the modules and tensors in the memo and for what cannot be copied."""
    if isinstance(value, ATOMS):
        return value
    if id(value) in memo:
        return memo[id(value)]
    held = chain(value, dict.values(value)) if isinstance(value, dict) else value
    if type(value) in CONTAINERS and all(type(one) in ATOMS or memo.get(id(one)) is one for one in held):
        # As most are; deepcopy takes its time.
        return memo.setdefault(id(value), value if isinstance(value, tuple) else type(value)(value))
    if isinstance(value, torch.Generator):
        return value.clone_state()
    new: dict[int, Any] = {}
    known = ChainMap(new, memo)
    try:
        with Copying(_cloned):
            # The memo is only read: half a copy leaves nothing in it, and `new` has copies alone.
            twin = copy.deepcopy(value, known)  # type: ignore[arg-type]
    except Exception:  # of any kind: a lock, an open file
        return _copied_in_part(value, memo)
    # What deepcopy keeps alive, under the id of its memo, lest an id be that of another object soon.
    memo.setdefault(id(memo), []).extend(new.pop(id(known), ()))
    for original, one in new.items():
        if isinstance(one, nn.Parameter) and original != id(one):
            vars(one)[ORIGINAL] = original
    memo |= new  # another attribute may hold the same object
    return twin


def _copied_in_part(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of an object of somebody's own, or of a container, by its parts; anything else itself.

    What other threads may wait for, such as a queue, has to stay the same.
    """
    if type(value) in (list, tuple):
        return type(value)(copied(one, memo) for one in value)
    # A copy's finalizer would run after the trial, and may close what the original still uses.
    if isinstance(value, dict) or (is_plain(value) and not hasattr(type(value), "__del__")):
        with suppress(Exception):  # of any kind
            twin = copy.copy(value)
            parts = twin if isinstance(value, dict) else vars(twin)
            # Before its parts are copied, as one of them may lead back to it.
            memo[id(value)] = twin
            parts.update({name: copied(one, memo) for name, one in parts.items()})
            return twin
    return value


class Copying(TorchFunctionMode):
    """Context in which tensors that are copied are what a function makes of them, or if that is None as ever."""

    def __init__(self, make: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__()
        self._make = make

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = self._make(args[0]) if func in (Tensor.clone, Tensor.__deepcopy__) else None
        return func(*args, **(kwargs or {})) if made is None else made


def _cloned(tensor: Tensor) -> Tensor | None:
    """A copy of a tensor that was computed, which deepcopy refuses; it depends on what that does."""
    with torch.enable_grad():
        return None if tensor.is_leaf else tensor.clone()


def is_plain(value: object) -> bool:
    """Whether it is an object of somebody's own class that is no module, such as one that changes modules."""
    kind = type(value)
    return not isinstance(value, (*CODE, partial, Tensor)) and kind.__dictoffset__ != 0 and not is_librarys(kind)


def is_librarys(what: FunctionType | type) -> bool:
    """Whether it is one of torch's or of Python's own, whose names say nothing of a model."""
    return what.__module__ is None or what.__module__.partition(".")[0] in LIBRARIES
