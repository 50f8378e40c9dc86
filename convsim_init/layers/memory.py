"""Which tensors share memory: told by where their entries lie, not by which object holds them."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from convsim_init.errors import InputError

MAX_WORK: Any = 10**5  # candidates that are tried where entries leave gaps
SOMEWHERE = 2**20  # an address that is not 0, where NumPy would take memory of its own


class Memory(NamedTuple):
    """Where a tensor's entries lie, in bytes: in a stretch that they may leave gaps in."""

    device: torch.device
    storage: int  # that is counted from; 0 where positions are addresses, of whatever storage
    start: int  # position of the first
    end: int  # position after the last
    size: int  # of an entry
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def memory(tensor: Tensor) -> Memory:
    """Where the entries of a dense tensor lie."""
    size, shape = tensor.element_size(), tuple(tensor.shape)
    strides = tuple(stride * size for stride in tensor.stride())
    storage, start = 0, tensor.data_ptr()
    if tensor.device.type not in ("cpu", "cuda"):  # where a pointer may be no address but a handle
        storage, start = tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()) * size
    # Of a tensor without entries the sum may be more than 0, as where its shape is [3, 0].
    extent = sum(stride * (count - 1) for stride, count in zip(strides, shape, strict=True)) + size
    return Memory(tensor.device, storage, start, start + extent if tensor.numel() else start, size, shape, strides)


def memories(tensors: Iterable[Tensor]) -> list[Memory]:
    """Where the entries of those tensors lie that have a memory of their own."""
    return [memory(one) for one in tensors if why_without_memory(one) is None]


def why_without_memory(tensor: Tensor) -> str | None:
    """Why the entries of a tensor lie in no memory of its own; None if they do."""
    # The order matters: lazy and sparse tensors have no storage, and would be taken for wrappers.
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


def overlap(a: Memory, b: Memory) -> bool:
    """Whether an entry of one tensor lies where one of another does; where that is hard to tell it counts as so."""
    if not (a.start < b.end and b.start < a.end and a[:2] == b[:2]):
        return False
    try:
        return np.shares_memory(_array(a), _array(b), max_work=MAX_WORK)
    except RuntimeError:  # too much work
        return True


def _array(one: Memory) -> np.ndarray[Any, Any]:
    """An array that lies as the tensor does, so far behind; it is not to be read."""
    interface = {
        "version": 3,
        "typestr": f"|V{one.size}",
        "shape": one.shape,
        "strides": one.strides,
        "data": (one.start + SOMEWHERE, True),
    }
    return np.asarray(SimpleNamespace(__array_interface__=interface))


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether entries of a tensor may be one in memory, as after ``expand`` or ``as_strided``."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        # No step is made along a dimension of one entry, where views leave any stride.
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def gradient_hooks(tensor: Tensor) -> list[dict[int, Any]]:
    """The hooks on a tensor's gradient, before and after it is added up, which are kept beside its memory."""
    kinds = (getattr(tensor, name, None) for name in ("_backward_hooks", "_post_accumulate_grad_hooks"))
    return [{} if hooks is None else hooks for hooks in kinds]


def has_no_data(tensor: Tensor) -> bool:
    """Whether it is on the meta device, or a `FakeTensor`."""
    return tensor.is_meta or type(tensor).__module__ == "torch._subclasses.fake_tensor"


def refuse_fake_mode() -> None:
    """Raise an `InputError` where a mode is on in which no tensor that is made has data."""
    # The device is named, as `torch.device("meta")` changes the default one and is no such mode.
    if has_no_data(torch.empty(0, device="cpu")):
        raise InputError("expected numbers to work on, got a call within FakeTensorMode: leave it first")


def is_wrapper(tensor: Tensor) -> bool:
    """Whether it stands for other tensors and has no memory of its own, as quantized, masked and nested ones do."""
    try:
        tensor.untyped_storage().data_ptr()
    except Exception:  # of several kinds, by what its class does with the question
        return True
    # A nested tensor has a storage, but raises errors when it is asked for its shape or strides.
    return tensor.is_nested


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a `DTensor`, whose module most programs never import."""
    return type(tensor).__module__.startswith("torch.distributed.tensor")
