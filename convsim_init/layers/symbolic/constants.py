"""Tensors with known values in a symbolic pass: they are computed, because code may keep them after the pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map_only

from convsim_init.layers.forward.copies import HEAVY
from convsim_init.layers.symbolic.symbols import Symbol, tensors_in

MAX_TURNS = 100  # of a loop over a tensor with known values
RANDOM = {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli"}
RANDOM |= {"multinomial", "poisson", "uniform", "random", "exponential", "dropout"}


class Constants:
    """The tensors that a pass has computed, and the symbols for those that unknown values were written into."""

    def __init__(self) -> None:
        self._made = set[Hashable]()  # by their memory
        self._written: dict[Hashable, Symbol] = {}  # by the memory of the tensor

    def can_compute(self, name: str, written: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether to compute a function: its arguments are known, its sizes small, and it changes nothing of others."""
        known = all(type(tensor) is Tensor and not tensor.is_meta for tensor in tensors_in((args, kwargs)))
        # Random numbers would decide which path code takes.
        if not known or name in RANDOM or any(_memory(tensor) not in self._made for tensor in tensors_in(written)):
            return False
        if name in ("unbind", "tolist") and is_long(args[0]):
            return False
        # The product bounds sizes such as those of zeros of a million rows and columns, meant for another device.
        return math.prod(leaf for leaf in tree_leaves((args, kwargs)) if type(leaf) is int and leaf > 1) <= HEAVY

    def compute(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call the function, with copies of all tensors that this pass did not create."""

        def owned(value: Any) -> Any:
            if isinstance(value, np.ndarray):
                return value.copy()
            return value if _memory(value) in self._made else value.clone()

        args, kwargs = tree_map_only((Tensor, np.ndarray), owned, (args, kwargs))
        output = func(*args, **kwargs)
        self._made.update(map(_memory, tensors_in(output)))
        return output

    def note_written(self, written: object, symbol: Symbol) -> None:
        """Note that a symbol stands for tensors of this pass from now on: something unknown was written to them."""
        self._written |= {memory: symbol for memory in map(_memory, tensors_in(written)) if memory in self._made}

    def updated(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The arguments, with symbols in place of tensors that something unknown was written to, and of their views."""
        if not self._written:
            return args, kwargs
        now = tree_map_only(Tensor, lambda tensor: self._written.get(_memory(tensor), tensor), (args, kwargs))
        return now[0], now[1]


def is_long(tensor: Tensor) -> bool:
    """Whether a loop over the tensor, such as one over time steps, is cut to one turn, as over unknown values."""
    return tensor.shape[:1].numel() > MAX_TURNS


def _memory(tensor: Tensor) -> Hashable:
    """A key for the memory of a tensor, the same for its views, `detach` and ``.data``; its id if it has no memory."""
    try:
        return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    except NotImplementedError:  # raised by sparse tensors, for one
        return id(tensor)
