"""Which tensors share memory, judged by the addresses of their entries and not by their identity."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from convsim_init.errors import InputError

MAX_WORK: Any = 10**5  # candidates that NumPy tries for entries with gaps
ADDRESS = 2**20  # added to all addresses, because for 0 NumPy would allocate memory


class Memory(NamedTuple):
    """The range of memory in which a tensor's entries lie, perhaps with gaps."""

    device: torch.device
    storage: int  # the storage that positions are relative to; 0 if they are addresses
    start: int  # position of the first entry, in bytes
    end: int  # position after the last entry, in bytes
    size: int  # bytes per entry
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes


def memory(tensor: Tensor) -> Memory:
    """The memory of a dense tensor."""
    size, shape = tensor.element_size(), tuple(tensor.shape)
    strides = tuple(stride * size for stride in tensor.stride())
    storage, start = 0, tensor.data_ptr()
    if tensor.device.type not in ("cpu", "cuda"):  # on other devices a pointer may be a handle and no address
        storage, start = tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()) * size
    # For a tensor without entries, such as one of shape [3, 0], the sum may be above 0.
    extent = sum(stride * (count - 1) for stride, count in zip(strides, shape, strict=True)) + size
    return Memory(tensor.device, storage, start, start + extent if tensor.numel() else start, size, shape, strides)


def memories(tensors: Iterable[Tensor]) -> list[Memory]:
    """The memory of each tensor that has one of its own."""
    return [memory(tensor) for tensor in tensors if why_without_memory(tensor) is None]


def why_without_memory(tensor: Tensor) -> str | None:
    """Why a tensor has no memory of its own; None if it has."""
    # The order matters: lazy and sparse tensors have no storage, and would count as wrappers.
    if is_lazy(tensor):
        return "lazy, without a weight yet: run a forward pass first"
    if has_no_data(tensor):
        return "on the meta device, without data: move it with to_empty and initialize it first"
    if is_sharded(tensor):
        return "sharded over processes: initialize the model before it is sharded"
    if tensor.layout is not torch.strided:
        return "a sparse tensor: make it dense first"
    if is_wrapper(tensor):
        kind = type(tensor).__name__
        return f"of class {kind}, which wraps other tensors: initialize the model before its weights are wrapped"
    return None


def is_readable(tensor: Tensor) -> bool:
    """Whether it is an ordinary dense tensor or parameter whose storage is not freed, which would end the program."""
    ordinary = type(tensor) in (Tensor, nn.Parameter) and why_without_memory(tensor) is None
    return ordinary and (tensor.data_ptr() != 0 or not tensor.numel())


def overlap(a: Memory, b: Memory) -> bool:
    """Whether two tensors share an entry; assumed if that takes too much work to find out."""
    if not (a.start < b.end and b.start < a.end and (a.device, a.storage) == (b.device, b.storage)):
        return False
    try:
        return np.shares_memory(_array(a), _array(b), max_work=MAX_WORK)
    except RuntimeError:  # raised if MAX_WORK does not suffice
        return True


def _array(memory: Memory) -> np.ndarray[Any, Any]:
    """An array with the shape and strides of the tensor, at a shifted address; it must not be read."""
    layout = {"typestr": f"|V{memory.size}", "shape": memory.shape, "strides": memory.strides}
    interface = {"version": 3, "data": (memory.start + ADDRESS, True), **layout}
    return np.asarray(SimpleNamespace(__array_interface__=interface))


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether entries of a tensor may share memory with each other, as after ``expand`` or ``as_strided``."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        # The stride along a dimension of one entry has no meaning, and views leave any there.
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def write_values(tensor: Tensor, values: Tensor) -> None:
    """Copy values to a tensor; to one that is expanded only once, because PyTorch refuses to write it."""
    if tensor.layout is torch.strided:
        once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())
        tensor, values = tensor[once], values[once]
    tensor.copy_(values)


def gradient_hooks(tensor: Tensor) -> list[dict[int, Any]]:
    """The hooks on a tensor's gradient: those before and those after its accumulation."""
    kinds = (getattr(tensor, name, None) for name in ("_backward_hooks", "_post_accumulate_grad_hooks"))
    return [{} if hooks is None else hooks for hooks in kinds]


def has_no_data(tensor: Tensor) -> bool:
    """Whether a tensor is on the meta device, or is a `FakeTensor`."""
    return tensor.is_meta or type(tensor).__module__ == "torch._subclasses.fake_tensor"


def refuse_fake_mode() -> None:
    """Raise an `InputError` if a mode is on in which new tensors have no data."""
    # The device is given, because `torch.device("meta")` changes the default one and is no such mode.
    if has_no_data(torch.empty(0, device="cpu")):
        raise InputError("expected numbers to work on, got a call within FakeTensorMode: leave it first")


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor wraps others and has no memory of its own, like quantized, masked and nested ones."""
    try:
        tensor.untyped_storage().data_ptr()
    except Exception:  # of a kind that depends on the class
        return True
    # A nested tensor has a storage, but raises errors if asked for its shape or strides.
    return tensor.is_nested


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor`; by name, because most programs never import that module."""
    return type(tensor).__module__.startswith("torch.distributed.tensor")
