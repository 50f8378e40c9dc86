"""What a change of dtype costs, and whether numbers of any dtypes are equal."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


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


@cache
def converts(dtype: torch.dtype) -> bool:
    """Whether torch converts its numbers to those of others, which it does not where they are packed, as of float4."""
    try:
        torch.empty(1, dtype=dtype, device="cpu").to(torch.complex128)
    except RuntimeError:  # or one of its kinds
        return False
    return True


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether shapes and values are equal, NaN to NaN, whatever the dtypes, of which `torch.equal` knows only some."""
    if a.shape != b.shape:
        return False
    # Sparse tensors know no ==.
    a, b = (one if one.layout is torch.strided else one.to_dense() for one in (a.detach().cpu(), b.detach().cpu()))
    if a.dtype != b.dtype and not (a.is_quantized or b.is_quantized):
        # Both in a dtype that holds all of their numbers: torch promotes neither float8 nor uint16.
        kinds = ((torch.is_complex, torch.complex128), (torch.is_floating_point, torch.float64))
        wide = next((dtype for is_kind, dtype in kinds if is_kind(a) or is_kind(b)), torch.int64)
        if not (converts(a.dtype) and converts(b.dtype)):
            return False
        a, b = a.to(wide), b.to(wide)
    return bool(((a == b) | ((a != a) & (b != b))).all())


def name_of(dtype: torch.dtype) -> str:
    """A dtype's name, such as ``float32``."""
    return str(dtype).removeprefix("torch.")


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    if dtype.is_floating_point:
        return "real"
    return "boolean" if dtype == torch.bool else "integer"
