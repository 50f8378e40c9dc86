"""A copy of a model on the meta device, whose forward passes leave the model itself unchanged."""

from __future__ import annotations

import copy
from contextlib import suppress
from functools import partial
from inspect import signature
from itertools import product
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from convsim_init.layers import tree
from convsim_init.layers.forward import copies
from convsim_init.layers.forward.code import HOOKS, codes_in, is_from_library, may_change
from convsim_init.layers.forward.isolation import tensors_of

# Types that the deepcopy of the model copies itself, or returns.
DEEP = (nn.Module, Tensor, dict, list, set, tuple, MethodType, FunctionType)
HOOK_OPTIONS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


def on_meta(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy of a model whose tensors have no data, with its hooks before and after forward passes.

    It shares with the model attributes that cannot be copied or are too heavy. The memo is that of deepcopy: it holds
    earlier copies by the ids of the originals, and the new ones are added.
    """
    memo = {} if memo is None else memo
    parts = [part for part in tree.modules(model) if id(part) not in memo]
    with copies.Copying(partial(torch.empty_like, device="meta")):
        for part in parts:
            for name, value in vars(part).items():
                # Hooks are copied after the model, because their copies refer to those of modules.
                if "hooks" in name and isinstance(value, dict):
                    memo[id(value)] = copy.copy(value) if name in HOOK_OPTIONS else type(value)()
            for tensor in tensors_of(part):
                # A lazy tensor has no shape yet, and a tensor of integers cannot require a gradient.
                empty = tensor if is_lazy(tensor) else torch.empty_like(tensor, device="meta")
                is_parameter = isinstance(tensor, nn.Parameter) and empty is not tensor
                memo[id(tensor)] = nn.Parameter(empty, False) if is_parameter else empty
        for part in parts:
            heavy = copies.heavy_attributes(part, parts)
            for name, value in vars(part).items():
                if name in heavy:
                    memo[id(value)] = value
                elif not isinstance(value, DEEP) and id(value) not in memo:
                    memo[id(value)] = copies.copied(value, memo)
        parallel = nn.parallel.DistributedDataParallel
        for part in parts:
            if isinstance(part, parallel) and type(part).forward is parallel.forward:
                memo[id(part)] = _Alone(copy.deepcopy(part.module, memo))
        needing = {kind for kind in set(map(type, parts)) if _needs_arguments(kind)}
        made = [part for part in parts if type(part) in needing]
        memo.update((id(part), object.__new__(type(part))) for part in made)
        for part in made:
            vars(memo[id(part)]).update(copy.deepcopy(vars(part), memo))
        clone = copy.deepcopy(model, memo)
        own = set(map(id, parts))
        for part in tree.modules(clone):
            if id(part) in own:  # forward passes would change the model itself
                raise TypeError(f"{type(part).__name__} does not let itself be copied")
            vars(part)["training"] = False
        for part in parts:
            # deepcopy returns a function itself, whose closure would lead the pass to the model itself.
            if isinstance(forward := vars(part).get("forward"), FunctionType) and id(part) in memo:
                with suppress(Exception):  # of any kind: something that cannot be copied
                    vars(memo[id(part)])["forward"] = _twin(forward, memo)
        for part, name in product(parts, HOOKS):
            for key, hook in vars(part).get(name, {}).items() if id(part) in memo else ():
                if not _is_from_library(hook) and (name == HOOKS[0] or may_change(hook)):
                    vars(memo[id(part)])[name][key] = _hook(hook, memo)
    return clone


class _Alone(nn.Module):
    """In place of a DistributedDataParallel, whose copy would talk to other processes about parameters with data."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def _needs_arguments(kind: type) -> bool:
    """Whether the ``__new__`` of a class needs arguments, which copy.deepcopy would not give."""
    try:
        signature(kind.__new__).bind(kind)
    except ValueError:  # from `signature`, for what is a dict as well, for one
        return False
    except TypeError:
        return not hasattr(kind, "__deepcopy__")
    return False


def _is_from_library(hook: Any) -> bool:
    """Whether a hook is PyTorch's own: those compute a weight or initialize a lazy parameter."""
    bare = hook.func if isinstance(hook, partial) else hook
    bare = bare.__func__ if isinstance(bare, MethodType) else bare
    return is_from_library(bare if isinstance(bare, FunctionType) else type(bare))


def _hook(hook: Any, memo: dict[int, Any]) -> Any:
    """A copy of a hook that refers to copies of modules and objects; a hook that raises if it cannot be copied."""
    try:
        return _twin(hook, memo)
    except Exception:  # of any kind: a module that cannot be copied
        return _unknown


def _unknown(*_: object) -> None:
    raise TypeError("a hook that cannot be copied")


def _twin(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of a hook or of a value that it refers to; a function of a library is returned itself."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, FunctionType):
        return value if is_from_library(value) else _rebound(value, memo)
    if isinstance(value, MethodType):
        return MethodType(_twin(value.__func__, memo), _twin(value.__self__, memo))
    if isinstance(value, partial):
        keywords = {name: _twin(argument, memo) for name, argument in value.keywords.items()}
        return partial(_twin(value.func, memo), *(_twin(argument, memo) for argument in value.args), **keywords)
    if isinstance(value, nn.Module):
        return on_meta(value, memo)
    if copies.is_heavy(value, tensors=False):
        raise TypeError(f"{type(value).__name__} is too heavy to be copied")
    memo[id(value)] = twin = copies.copied(value, memo)
    return twin


def _rebound(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """A copy of a function whose closure and globals refer to copies; functions of other modules stay themselves."""
    cells = tuple(CellType() for _ in function.__closure__ or ())
    known = dict(function.__globals__)
    twin = FunctionType(function.__code__, known, function.__name__, function.__defaults__, cells)
    twin.__kwdefaults__ = function.__kwdefaults__
    vars(twin).update(vars(function))
    memo[id(function)] = twin  # first, because a function may refer to itself
    for cell, original in zip(cells, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # raised by a cell that is still empty
            cell.cell_contents = _twin(original.cell_contents, memo)
    for name in {name for code in codes_in(function.__code__) for name in code.co_names} & known.keys():
        if getattr(known[name], "__globals__", function.__globals__) is function.__globals__:
            known[name] = _twin(known[name], memo)
    return twin
