"""A copy of a model on the meta device, for forward passes that leave the model itself as it is."""

from __future__ import annotations

import copy
from contextlib import suppress
from functools import partial
from itertools import product
from types import CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from convsim_init.layers import tree
from convsim_init.layers.forward.copies import copied, heavy_attributes, is_heavy, is_librarys

DEEP = (nn.Module, Tensor, dict, list, set, tuple, MethodType)  # what a deep copy of the model copies by itself
HOOKS = ("_forward_pre_hooks", "_forward_hooks")
HOOK_OPTIONS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


def on_meta(model: nn.Module) -> nn.Module:
    """A copy whose tensors have no data, with hooks before and after forward passes.

    Attributes that cannot be copied, or are too heavy, it shares with the model.
    """
    memo: dict[int, Any] = {}
    parts = list(tree.modules(model))
    for part in parts:
        for name, value in vars(part).items():
            if "hooks" in name and isinstance(value, dict):
                memo[id(value)] = copy.copy(value) if name in HOOK_OPTIONS else type(value)()
        for tensor in (*part._parameters.values(), *part._buffers.values(), *vars(part).values()):
            if is_lazy(tensor):
                memo[id(tensor)] = tensor
            elif isinstance(tensor, Tensor):
                empty = torch.empty_like(tensor, device="meta")
                memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    for part in parts:
        heavy = heavy_attributes(part, parts)
        for name, value in vars(part).items():
            if name in heavy:
                memo[id(value)] = value
            elif not isinstance(value, DEEP) and id(value) not in memo:
                memo[id(value)] = copied(value, memo)
    clone = copy.deepcopy(model, memo)
    own = set(map(id, parts))
    for part in tree.modules(clone):
        if id(part) in own:  # which the pass would change
            raise TypeError(f"{type(part).__name__} does not let itself be copied")
        vars(part)["training"] = False
    for part, name in product(parts, HOOKS):
        twin = memo.get(id(part))
        hooks = {key: _rebound(hook, memo) for key, hook in vars(part).get(name, {}).items() if not _is_librarys(hook)}
        if twin is not None:
            vars(twin)[name].update(hooks)
    return clone


def _is_librarys(hook: Any) -> bool:
    """Whether it is PyTorch's, which computes a weight or makes a parameter that is lazy."""
    bare = hook.func if isinstance(hook, partial) else hook
    bare = bare.__func__ if isinstance(bare, MethodType) else bare
    return is_librarys(bare if isinstance(bare, FunctionType) else type(bare))


def _rebound(hook: Any, memo: dict[int, Any]) -> Any:
    """A copy of a hook that knows the copy of the model, but for other modules and for what is heavy."""

    def twin(value: Any) -> Any:
        known = not isinstance(value, nn.Module) or id(value) in memo
        return copied(value, memo) if known and not is_heavy(SimpleNamespace(value=value)) else value

    if not isinstance(hook, FunctionType):
        return twin(hook)
    cells = []
    for cell in hook.__closure__ or ():
        with suppress(ValueError):  # empty yet
            cell = CellType(twin(cell.cell_contents))
        cells.append(cell)
    rebound = FunctionType(hook.__code__, hook.__globals__, hook.__name__, hook.__defaults__, tuple(cells))
    rebound.__kwdefaults__ = hook.__kwdefaults__
    return rebound
