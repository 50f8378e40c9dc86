"""A GPU that is not there: tensors that say they lie on one, computed with on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda:0")
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
WAITS = (aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default)
NO_LAUNCH = ("empty", "_unsafe_view", "unbind")


class OnCard(Tensor):
    """A tensor on the pretended GPU; its values are those of ``held``, on the CPU.

    To torch's C++ code, which asks a real GPU about tensors on one, it lies on "meta".
    """

    held: Tensor
    device, is_cuda = DEVICE, True

    @staticmethod
    def __new__(cls, held: Tensor) -> OnCard:
        size, layout = held.shape, {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, size, dtype=held.dtype, device="meta", **layout)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of the pretended GPU")


class PretendedCard(TorchDispatchMode):
    """While it is entered there is a GPU, which counts what it is asked to do.

    Memory that nobody has written is NaN. An operation on tensors of both devices fails.

    Attributes:
        launches: Kernels and copies started.
        waits: Times the host waited for the GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = [tensor for tensor in tensors if isinstance(tensor, OnCard)]
        device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        to_card = device.type in ("cuda", "meta") if device else bool(here)
        if func is aten.copy_.default:
            to_card = isinstance(args[0], OnCard)
        if here and func not in COPIES:
            assert all(isinstance(tensor, OnCard) or tensor.dim() == 0 for tensor in tensors), f"{func}: mixed devices"
        if here or to_card:
            self._count(func, here, tensors, to_card, args, kwargs)
        held, held_kwargs = tree_map(unwrap, (args, kwargs))
        if device is not None:
            held_kwargs["device"] = "cpu"
        result = func(*held, **held_kwargs)
        if not to_card:
            return result
        if "empty" in func.__name__ and result.is_floating_point():
            result.fill_(torch.nan)
        known = {id(tensor.held): tensor for tensor in here}
        return tree_map(lambda leaf: known.get(id(leaf), wrap(leaf)), result)

    def _count(self, func, here, tensors, to_card, args, kwargs) -> None:
        if func in WAITS:
            self.waits += 1
        if func in COPIES and not (to_card and len(here) == len(tensors)):  # from one device to the other
            in_advance = to_card and (kwargs.get("non_blocking") or args[2:] == (True,))
            self.waits += not in_advance
        views = any(each.alias_info and not each.alias_info.is_write for each in func._schema.arguments)
        self.launches += not views and not any(name in func.__name__ for name in NO_LAUNCH)
        self.launches += "sum" in func.__name__ and kwargs.get("dtype") not in (None, tensors[0].dtype)  # a cast first

    def launcher(self, kernel):
        """A Triton kernel that takes tensors of this GPU, and is counted."""
        return _Launcher(self, kernel)


class _Launcher:
    def __init__(self, card: PretendedCard, kernel) -> None:
        self._card, self._kernel = card, kernel

    def __getitem__(self, grid):
        def launch(*args, **kwargs) -> None:
            assert all(isinstance(each, OnCard) for each in args if isinstance(each, Tensor)), "not on the GPU"
            self._card.launches += 1
            with _disable_current_modes():
                self._kernel[grid](*map(unwrap, args), **kwargs)

        return launch


def unwrap(value):
    return value.held if isinstance(value, OnCard) else value


def wrap(value):
    return OnCard(value) if isinstance(value, Tensor) else value
