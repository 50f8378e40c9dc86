"""A convolution's weight as a filter bank ``[G, M, C, *kernel_size]``; norms, pair counts and dtypes.

Letters: G groups, M filters of a group, C input channels of a group.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from numbers import Integral

import torch
from torch import Tensor

from convsim_init.errors import InputError
from convsim_init.settings import Channels, Pairs

SMALL_NORM, LARGE_NORM = 1e-15, 1e15  # between these a float32 norm can be squared


def filter_bank(weight: Tensor, *, groups: int = 1, transposed: bool = False, channels: Channels = "matched") -> Tensor:
    """View a convolution's weight as groups of filters that can be similar to each other.

    Returns:
        ``[G, M, C, *kernel_size]``. With ``channels="all"`` every filter can be similar to every other: G is 1.

    Raises:
        InputError: If the weight is no real floating tensor of a convolution with that many groups.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise InputError(f"expected a convolution weight of a floating dtype, got {got}")
    if weight.dim() < 2 or weight.numel() == 0:
        layout = "[in_channels, out_channels / groups" if transposed else "[out_channels, in_channels / groups"
        raise InputError(f"expected a weight of shape {layout}, *kernel_size] without zeros, got {list(weight.shape)}")
    if not isinstance(groups, Integral) or isinstance(groups, bool) or groups < 1 or weight.shape[0] % groups:
        raise InputError(f"expected groups to divide dimension 0 of the weight {list(weight.shape)}, got {groups!r}")
    bank = weight.reshape(groups, -1, *weight.shape[1:])
    if transposed:
        bank = bank.transpose(1, 2)
    return bank.flatten(0, 1)[None] if channels == "all" else bank


def computing_bank(
    weight: Tensor, *, groups: int = 1, transposed: bool = False, channels: Channels = "matched"
) -> Tensor:
    """`filter_bank` of a weight, contiguous, on the device and in the dtype that computations run in.

    It may share the weight's memory.
    """
    bank = filter_bank(weight, groups=groups, transposed=transposed, channels=channels)
    return bank.to(computing_device(weight.device), accumulation_dtype(weight.dtype)).contiguous()


def computing_device(device: torch.device) -> torch.device:
    """The device that computes with weights on ``device``: the CPU for Apple's MPS, which lacks float64 and `eigh`."""
    return torch.device("cpu") if device.type == "mps" else device


def bank_weight(bank: Tensor, *, groups: int = 1, transposed: bool = False) -> Tensor:
    """The convolution's weight that `filter_bank` viewed as ``bank``."""
    filters = bank.reshape(groups, -1, *bank.shape[2:])  # [G, M, C, *kernel_size], also where every pair counted
    return (filters.transpose(1, 2) if transposed else filters).flatten(0, 1)


def count_pairs(active: Tensor, pairs: Pairs) -> Tensor:
    """Number of filter pairs, given which filters ``[G, M]`` take part."""
    if pairs == "all":
        filters = active.sum(-1)
        return (filters * (filters - 1) // 2).sum()
    return (active[:, 1:] & active[:, :-1]).sum()


def filter_norms(bank: Tensor) -> Tensor:
    """L2 norms ``[G, M]`` of the filters of a bank ``[G, M, C, *kernel_size]``; no finite filter's overflows."""
    norms: Tensor = torch.linalg.vector_norm(bank.flatten(2), dim=-1)
    # There is no float64 on MPS, and there are no numbers on the meta device.
    if bank.device.type in ("mps", "meta") or bool(((norms > SMALL_NORM) & (norms < LARGE_NORM)).all()):
        return norms
    # These norms stay in float64, for they may be below 1e-45 or above 3e38, where float32 ends.
    filters = bank.flatten(2).double()
    largest = filters.abs().amax(-1)  # divided by it, no entry's square vanishes or overflows
    exact: Tensor = largest * torch.linalg.vector_norm(filters / nonzero(largest)[..., None], dim=-1)
    return exact


def unit_filters(bank: Tensor, norms: Tensor) -> Tensor:
    """A bank ``[G, M, C, *kernel_size]`` over its `filter_norms`, in its own dtype; filters that are zero stay zero."""
    return (bank / per_filter(nonzero(norms), bank)).to(bank.dtype)


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor that is not empty holds neither infinities nor NaN; one pass, nothing allocated."""
    # Where there is a NaN, both the minimum and the maximum are NaN.
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))


def nonzero(norms: Tensor) -> Tensor:
    """The norms to divide by: 1 for filters that are zero."""
    return torch.where(norms > 0, norms, 1)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Context in which an autocast of the caller does not lower the precision of products."""
    # autocast raises on the meta device, even to be disabled.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def per_filter(values: Tensor, bank: Tensor) -> Tensor:
    """Reshape ``[G, M]`` so that it multiplies the filters of ``bank``."""
    return values.reshape(*values.shape, *[1] * (bank.dim() - 2))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that computations on weights of ``dtype`` run in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
