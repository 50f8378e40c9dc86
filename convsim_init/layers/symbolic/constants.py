"""Known numbers that code makes in a pass on unknown values: they are computed, as it may keep them where they stay."""

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

TURNS = 100  # of a loop over what is known
RANDOM = {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli"}
RANDOM |= {"multinomial", "poisson", "uniform", "random", "exponential", "dropout"}


class Constants:
    """The constants of a pass, each known by its memory, and what those are that something unknown was written into."""

    def __init__(self) -> None:
        self._made = set[Hashable]()
        self._written: dict[Hashable, Symbol] = {}

    def are_made_by(self, name: str, written: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether what a function is given is known, not changed unless it was made here, and no large size."""
        known = all(type(one) is Tensor and not one.is_meta for one in tensors_in((args, kwargs)))
        # Random numbers would decide which way code goes.
        if not known or name in RANDOM or any(_memory(one) not in self._made for one in tensors_in(written)):
            return False
        if name in ("unbind", "tolist") and is_long(args[0]):
            return False
        # As for zeros of a million rows and columns, which are there to be on another device.
        return math.prod(one for one in tree_leaves((args, kwargs)) if type(one) is int and one > 1) <= HEAVY

    def compute(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a function returns; what it is given and was not made here it is given a copy of."""

        def owned(value: Any) -> Any:
            if isinstance(value, np.ndarray):
                return value.copy()
            return value if _memory(value) in self._made else value.clone()

        args, kwargs = tree_map_only((Tensor, np.ndarray), owned, (args, kwargs))
        output = func(*args, **kwargs)
        self._made.update(map(_memory, tensors_in(output)))
        return output

    def note_written(self, written: object, symbol: Symbol) -> None:
        """Note what became of constants that something unknown was written into."""
        self._written |= {one: symbol for one in map(_memory, tensors_in(written)) if one in self._made}

    def as_they_are_now(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The arguments, with what became of constants in their place, perhaps by another name of their memory."""
        if not self._written:
            return args, kwargs
        now = tree_map_only(Tensor, lambda tensor: self._written.get(_memory(tensor), tensor), (args, kwargs))
        return now[0], now[1]


def is_long(tensor: Tensor) -> bool:
    """Whether a loop over it is taken for one over unknown values, which is one turn long, as one over time steps."""
    return tensor.shape[:1].numel() > TURNS


def _memory(tensor: Tensor) -> Hashable:
    """The memory of a tensor, which its views, `detach` and ``.data`` share; one without any is alone."""
    try:
        return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    except NotImplementedError:  # as that of a sparse one
        return id(tensor)
