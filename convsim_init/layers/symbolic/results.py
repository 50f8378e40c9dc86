"""What the arguments of a function tell about its result, although the values are unknown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from convsim_init.layers.symbolic.constants import is_long
from convsim_init.layers.symbolic.symbols import Symbol

# Functions that remove the dimensions given as ``dim``:
REDUCING = {"mean", "sum", "prod", "all", "any", "amax", "amin", "argmax", "argmin", "squeeze", "select"}


def added_dimensions(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Dimensions that the result has more than the first argument; 0 if unknown."""
    if name == "unsqueeze":
        return 1
    if name == "getitem":
        if not isinstance(args[1], tuple):  # a number may be an index into a list of values
            return int(args[1] is None)
        return sum((index is None) - (type(index) is int) for index in args[1])
    if name in REDUCING:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        keepdim = kwargs.get("keepdim", name != "select" and len(args) > 2)
        count = len(dim) if isinstance(dim, (tuple, list)) else type(dim) is int
        return -count if keepdim is False else 0
    return 0


def tensor_count(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """How many tensors a function returns; None if its arguments do not show it, or if it returns a single one."""
    if name in ("meshgrid", "broadcast_tensors"):
        return len(args[0] if isinstance(args[0], (list, tuple)) else args)
    # A loop over a parameter also arrives here:
    if name == "unbind" and args and not isinstance(args[0], Symbol) and not is_long(args[0]):
        return int(args[0].shape[next(iter([*args[1:], *kwargs.values()]), 0)])
    if name in ("chunk", "unsafe_chunk", "split", "split_with_sizes", "tensor_split"):
        parts = next(iter([*args[1:2], *(value for key, value in kwargs.items() if key != "dim")]), None)
        if isinstance(parts, (list, tuple)):
            return len(parts) + (name == "tensor_split")
        return parts if isinstance(parts, int) and name != "split" else None
    return None
