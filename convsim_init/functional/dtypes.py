"""What a change of dtype costs."""

from __future__ import annotations

import torch


def same_kind(a: torch.dtype, b: torch.dtype) -> bool:
    """Whether both are real floats, complex ones, integers, or booleans."""
    return _kind(a) == _kind(b)


def narrows(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether a dtype has less range or precision than another of its kind, so that values may not survive."""
    if source == target or not same_kind(source, target):
        return False
    if _kind(source) == "integer":
        low, high = torch.iinfo(source), torch.iinfo(target)
        return low.min < high.min or low.max > high.max
    wide, narrow = torch.finfo(source), torch.finfo(target)
    return wide.eps < narrow.eps or wide.max > narrow.max or wide.tiny < narrow.tiny


def name_of(dtype: torch.dtype) -> str:
    """A dtype's name, such as ``float32``."""
    return str(dtype).removeprefix("torch.")


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    if dtype.is_floating_point:
        return "real"
    return "boolean" if dtype == torch.bool else "integer"
