"""Which tensors share memory: told by where their entries lie, not by which object holds them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy


class Memory(NamedTuple):
    """The stretch of a storage that a tensor's entries lie in, in bytes."""

    device: torch.device
    storage: int
    start: int
    end: int


def memory(tensor: Tensor) -> Memory:
    """Where the entries of a dense tensor lie; those of a strided one may leave gaps."""
    extent = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)) + 1
    start = int(tensor.storage_offset()) * tensor.element_size()
    end = start + int(extent) * tensor.element_size() if tensor.numel() else start
    return Memory(tensor.device, tensor.untyped_storage().data_ptr(), start, end)


def memories(tensors: Iterable[Tensor]) -> list[Memory]:
    """Where the entries of those tensors lie that have any: not lazy, without data, sparse, sharded or wrapped ones."""
    without = (is_lazy, has_no_data, _is_sparse, is_sharded, is_wrapper)
    return [memory(one) for one in tensors if not any(is_so(one) for is_so in without)]


def overlap(a: Memory, b: Memory) -> bool:
    """Whether two tensors lie in a stretch of memory that both use."""
    return a[:2] == b[:2] and a.start < b.end and b.start < a.end


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether entries of a tensor may be one in memory, as after ``expand`` or ``as_strided``."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _is_sparse(tensor: Tensor) -> bool:
    return tensor.layout is not torch.strided


def has_no_data(tensor: Tensor) -> bool:
    """Whether it is on the meta device, or a `FakeTensor`."""
    return tensor.is_meta or type(tensor).__module__ == "torch._subclasses.fake_tensor"


def is_wrapper(tensor: Tensor) -> bool:
    """Whether it stands for other tensors and has no memory of its own, as quantized, masked and nested ones do."""
    try:
        tensor.untyped_storage().data_ptr()
    except Exception:  # of several kinds, by what its class does with the question
        return True
    return tensor.is_nested


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a `DTensor`, whose module most programs never import."""
    return type(tensor).__module__.startswith("torch.distributed.tensor")
