"""What a change of dtype costs, and whether numbers of any dtypes are equal."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def same_kind(a: torch.dtype, b: torch.dtype) -> bool:
    """Whether both dtypes are real, both complex, both of integers, or both boolean."""
    return _kind(a) == _kind(b)


def narrows(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether ``target`` has less range or precision than ``source``, of the same kind, and may change values."""
    if source == target or not same_kind(source, target):
        return False
    if _kind(source) == "integer":
        old, new = torch.iinfo(source), torch.iinfo(target)
        return old.min < new.min or old.max > new.max
    before, after = torch.finfo(source), torch.finfo(target)
    return before.eps < after.eps or before.max > after.max or before.tiny < after.tiny


@cache
def converts(dtype: torch.dtype) -> bool:
    """Whether torch converts tensors of this dtype to others: not those that pack several numbers, such as float4."""
    try:
        torch.empty(1, dtype=dtype, device="cpu").to(torch.complex128)
    except RuntimeError:  # NotImplementedError is one, too
        return False
    return True


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether shapes and values are equal, also of dtypes that `torch.equal` does not know; NaN is equal to NaN."""
    if a.shape != b.shape:
        return False
    a, b = a.detach().cpu(), b.detach().cpu()
    # `==` is not implemented for sparse tensors.
    a, b = (tensor if tensor.layout is torch.strided else tensor.to_dense() for tensor in (a, b))
    if a.dtype != b.dtype and not (a.is_quantized or b.is_quantized):
        # To a dtype that holds the numbers of both, because torch promotes neither float8 nor uint16.
        kinds = ((torch.is_complex, torch.complex128), (torch.is_floating_point, torch.float64))
        common = next((dtype for is_kind, dtype in kinds if is_kind(a) or is_kind(b)), torch.int64)
        if not (converts(a.dtype) and converts(b.dtype)):
            return False
        a, b = a.to(common), b.to(common)
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
