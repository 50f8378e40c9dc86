"""Copies of the attributes of modules, except for those that cannot be copied or are too heavy."""

from __future__ import annotations

import copy
from collections import ChainMap, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from convsim_init.layers.forward.code import is_from_library, names_of

ORIGINAL = "_copied_from"  # attribute of a parameter's copy: the id of the original
ATOMS = (bool, int, float, str, type(None))
CODE = (nn.Module, type, FunctionType, MethodType, ModuleType)  # types whose attributes are not searched
CONTAINERS = (tuple, list, set, dict, OrderedDict)
HEAVY, MANY = 2**27, 10**5  # bytes of tensors, and number of objects, above which an attribute is not copied


def heavy_attributes(part: nn.Module, parts: Sequence[nn.Module]) -> set[str]:
    """Heavy attributes of a module that no forward pass of the parts names, such as a trainer or a data set."""
    light = (*ATOMS, Tensor, dict, list, tuple, set)
    found = {name for name, value in vars(part).items() if not isinstance(value, light) and is_heavy(value)}
    return found - names_of(parts) if found else found


def is_heavy(value: object, *, tensors: bool = True) -> bool:
    """Whether an object leads to many others, or to large arrays or, where they count, large tensors."""
    size, known, pending = 0, set[int](), list[object]([value])
    for item in pending:
        if id(item) in known:
            continue
        known.add(id(item))
        with suppress(Exception):  # of any kind, from code of the object's own class
            if isinstance(item, Tensor):
                size += item.nbytes if tensors and item.layout is torch.strided else 0
            elif isinstance(item, np.ndarray):
                size += item.nbytes
            elif isinstance(item, dict) or not isinstance(item, Mapping):  # other mappings may load their values
                pending += item if isinstance(item, deque) else inside(item)
        if size > HEAVY or len(pending) > MANY:
            return True
    return False


def inside(value: object) -> Iterable[object]:
    """The items of a container, or the values of an object's attributes; nothing for modules and code."""
    with suppress(Exception):  # of any kind, from code of the object's own class
        if isinstance(value, slice):
            return value.start, value.stop, value.step
        if isinstance(value, Mapping):
            return list(value.values())
        if isinstance(value, (list, tuple, set)):
            return list(value)
        return () if isinstance(value, CODE) else list(vars(value).values())
    return ()


def referred_to(value: object) -> Iterable[object]:
    """What a function refers to by its closure, a method by its object, and others as `inside` says."""
    if isinstance(value, MethodType):
        return value.__func__, value.__self__
    if isinstance(value, partial):
        return value.func, *value.args, *value.keywords.values()
    if isinstance(value, FunctionType):
        cells = []
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # raised by a cell that is still empty
                cells.append(cell.cell_contents)
        return cells
    return [*value, *value.values()] if isinstance(value, dict) else inside(value)


def copied(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of an attribute's value, or the value itself if it cannot be copied; the memo is that of deepcopy."""
    if isinstance(value, ATOMS):
        return value
    if id(value) in memo:
        return memo[id(value)]
    items = chain(value, dict.values(value)) if isinstance(value, dict) else value
    if type(value) in CONTAINERS and all(type(item) in ATOMS or memo.get(id(item)) is item for item in items):
        # The usual case: a shallow copy will do, and deepcopy is slow.
        return memo.setdefault(id(value), value if isinstance(value, tuple) else type(value)(value))
    if isinstance(value, torch.Generator):
        return value.clone_state()
    new: dict[int, Any] = {}
    known = ChainMap(new, memo)
    try:
        with Copying(_cloned):
            # New entries go to `new`, so that a copy that fails half-way leaves nothing in the memo.
            twin = copy.deepcopy(value, known)  # type: ignore[arg-type]
    except Exception:  # of any kind: a lock, an open file
        return _copied_in_part(value, memo)
    # Under the id of its memo deepcopy keeps temporary objects alive, whose ids others would take over.
    memo.setdefault(id(memo), []).extend(new.pop(id(known), ()))
    for original, new_value in new.items():
        if isinstance(new_value, nn.Parameter) and original != id(new_value):
            vars(new_value)[ORIGINAL] = original
    memo |= new  # another attribute may hold the same object
    return twin


def _copied_in_part(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of a list, tuple, dict or plain object, item by item; other values, such as a queue, stay themselves."""
    if type(value) in (list, tuple):
        return type(value)(copied(item, memo) for item in value)
    # The finalizer of a copy would run after the trial, and might close a resource of the original.
    if isinstance(value, dict) or (is_plain(value) and not hasattr(type(value), "__del__")):
        with suppress(Exception):  # of any kind
            twin = copy.copy(value)
            parts = twin if isinstance(value, dict) else vars(twin)
            # The memo needs the copy before its parts are copied, because they may lead back to it.
            memo[id(value)] = twin
            parts.update({name: copied(part, memo) for name, part in parts.items()})
            return twin
    return value


class Copying(TorchFunctionMode):
    """Context in which deepcopying or cloning a tensor returns `make(tensor)`, or a normal copy where that is None."""

    def __init__(self, make: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__()
        self._make = make

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = self._make(args[0]) if func in (Tensor.clone, Tensor.__deepcopy__) else None
        return func(*args, **(kwargs or {})) if made is None else made


def _cloned(tensor: Tensor) -> Tensor | None:
    """A copy of a tensor that is no leaf, which deepcopy refuses; None for a leaf. Derivatives pass through it."""
    with torch.enable_grad():
        return None if tensor.is_leaf else tensor.clone()


def is_plain(value: object) -> bool:
    """Whether it is an ordinary object with attributes, of a class that belongs to no library, and no module."""
    kind = type(value)
    return not isinstance(value, (*CODE, partial, Tensor)) and kind.__dictoffset__ != 0 and not is_from_library(kind)
