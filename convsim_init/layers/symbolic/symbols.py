"""Symbols for unknown values, and the calls that return them: these are recorded and never computed."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from convsim_init.layers.forward.calls import Convolution
from convsim_init.layers.forward.copies import inside
from convsim_init.layers.symbolic.answers import unpacked

DEPTH = 8  # levels of nested containers and objects that are searched for tensors
OPERATORS = {"add", "sub", "mul", "truediv", "div", "floordiv", "mod", "matmul", "pow"}  # also after an i or r


@dataclass(eq=False)
class Node:
    """A call in a symbolic forward pass, or an argument of the pass."""

    name: str  # of the function, method or operator; `call_name` of a module; empty for an argument of the pass
    inputs: tuple[Node, ...] = ()  # the calls that returned its arguments
    learned: frozenset[int] = frozenset()  # ids of the parameters among its arguments
    module: nn.Module | None = None  # the module that was called
    # A call whose only argument is the weight that a convolving function was given. For a module that convolves it is
    # None, unless its weight was replaced in the pass.
    weight: Node | None = None
    convolution: Convolution | None = None  # the arguments of such a function
    changed: frozenset[int] = frozenset()  # ids of the parameters that it changed in place
    caller: nn.Module | None = None  # the module in whose forward pass it was called
    hook: str = ""  # "before" or "after" if it was called in a hook of that module
    added: int = 0  # number of dimensions that its value has more than its first argument; 0 if unknown
    is_size: bool = field(init=False)  # whether it is a number computed from shapes alone

    def __post_init__(self) -> None:
        # An operator on parameters has no inputs, for which `all` would be true.
        operator = self.name in (*OPERATORS, "array_wrap") and bool(self.inputs)  # the last for a function of NumPy
        self.is_size = self.name in ("size", "numel") or (operator and all(before.is_size for before in self.inputs))


class Symbol(Tensor):
    """An unknown value, perhaps a view of another one."""

    node: Node  # the call that returned it
    base: Symbol | None  # the value that it is a view of
    parameters: frozenset[int]  # ids of the parameters that it is a view of
    make: Callable[..., Symbol]  # `SymbolicPass.symbol` of its pass

    def __getattr__(self, name: str) -> Symbol:
        if name.startswith("_") or (self.node.module is None and self.node.name not in ("", "getitem")):
            # Functions return tensors, which have no other attributes.
            raise AttributeError(name)
        return self.make(name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Symbol:
        """The result of calling an unknown object."""
        return self.make(self.node.name, self, args, kwargs)

    def __iter__(self) -> Iterator[Symbol]:
        """As many values as the code unpacks, or a single one."""
        frame = sys._getframe(1)
        return iter([self.make("getitem", self) for _ in range(unpacked(frame.f_code, frame.f_lasti)[0])])

    @classmethod
    def __torch_dispatch__(cls, func: object, *_: object) -> Any:
        """Raise an error at a computation of compiled code, which function modes do not see."""
        raise TypeError(f"{func} of an unknown value")

    # Attributes of the results of `torch.max` and others, or of a dictionary.
    values = property(lambda self: self.make("values", self))
    indices = property(lambda self: self.make("indices", self))


class Shape(tuple[Any, ...]):
    """The shape of an unknown value: a tuple of unknown numbers."""

    __slots__ = ()

    def numel(self) -> Any:
        """The product of the sizes."""
        return math.prod(self)


def kind_of(func: Callable[..., Any]) -> str:
    """The ``__name__`` of a function; an operator of ``torch.ops`` loses its overload: ``add_`` for ``add_.Tensor``."""
    return str(getattr(func, "__name__", "")).partition(".")[0]


def name_of(func: Callable[..., Any]) -> str:
    """The name of a function, method, operator or attribute without underscores: ``mul`` for all that multiply."""
    name = kind_of(func)
    if name in ("__get__", "__set__"):
        name = func.__self__.__name__  # type: ignore[attr-defined]
    if name in ("__rdiv__", "__rtruediv__"):
        return "reciprocal"
    bare: str = name.strip("_")
    return bare[1:] if name.startswith("__") and bare[1:] in OPERATORS else bare


def bases(tensor: object) -> frozenset[int]:
    """The ids of the parameters in whose memory a tensor lies."""
    if isinstance(tensor, Symbol):
        return tensor.parameters
    return frozenset({id(tensor)} if isinstance(tensor, nn.Parameter) else ())


def is_in_place(kind: str) -> bool:
    """Whether a method or operator changes the tensor that it is called on."""
    operator = kind.startswith("__i") and kind.strip("_")[1:] in OPERATORS
    return operator or kind in ("__setitem__", "__set__") or (kind.endswith("_") and not kind.endswith("__"))


def tensors_in(value: object, depth: int = DEPTH) -> Iterator[Tensor]:
    """The value if it is a tensor, or the tensors in containers and objects nested up to that depth."""
    if isinstance(value, Tensor):
        yield value
    elif depth:
        for inner in inside(value):
            yield from tensors_in(inner, depth - 1)
