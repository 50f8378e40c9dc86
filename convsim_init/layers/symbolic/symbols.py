"""Unknown values, and the calls that they come from: what code computes with them is noted, never computed."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from convsim_init.layers.forward.calls import Convolution
from convsim_init.layers.forward.copies import inside
from convsim_init.layers.symbolic.answers import unpacked

DEPTH = 8  # of containers and objects within each other that are looked through for values
OPERATORS = {"add", "sub", "mul", "truediv", "div", "floordiv", "mod", "matmul", "pow"}  # also with an i or r before


@dataclass(eq=False)
class Node:
    """A call in a forward pass, or an argument of it; parameters by their ids."""

    name: str  # of the function, method or operator; what `call_name` says of a module; empty for an argument
    inputs: tuple[Node, ...] = ()  # the calls whose values it was given
    learned: frozenset[int] = frozenset()  # the parameters that it was given
    module: nn.Module | None = None  # that was called
    # What a function that convolves was given as its weight, as a call that was given nothing else; of a module that
    # convolves, if that is not its own any more:
    weight: Node | None = None
    convolution: Convolution | None = None  # what such a function was given
    changed: frozenset[int] = frozenset()  # the parameters that it changed in place
    caller: nn.Module | None = None  # in whose forward pass it was called
    hook: str = ""  # if in a hook of that module, in which
    added: int = 0  # how many dimensions its value has more than the first one that it was given, where that is known
    is_size: bool = field(init=False)  # whether it is a number that is computed from shapes alone

    def __post_init__(self) -> None:
        # Of an operator on parameters there are no inputs, all of which would be sizes.
        operator = self.name in OPERATORS and bool(self.inputs)
        self.is_size = self.name == "size" or (operator and all(one.is_size for one in self.inputs))


class Symbol(Tensor):
    """An unknown value, perhaps a view of another one."""

    node: Node
    base: Symbol | None
    parameters: frozenset[int]  # that it is a view of, by their ids
    make: Callable[..., Symbol]  # the value of a call, in the same pass

    def __getattr__(self, name: str) -> Symbol:
        if name.startswith("_") or (self.node.module is None and self.node.name not in ("", "getitem")):
            # What functions return are tensors.
            raise AttributeError(name)
        return self.make(name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Symbol:
        """Call what an unknown object holds."""
        return self.make(self.node.name, self, args, kwargs)

    def __iter__(self) -> Iterator[Symbol]:
        """As many values as the code unpacks, or else one."""
        frame = sys._getframe(1)
        return iter([self.make("getitem", self) for _ in range(unpacked(frame.f_code, frame.f_lasti)[0])])

    @classmethod
    def __torch_dispatch__(cls, func: object, *_: object) -> Any:
        """Refuse what compiled code computes, of which nothing would be known."""
        raise TypeError(f"{func} of an unknown value")

    # Of what `torch.max` and others return, or of a dictionary:
    values = property(lambda self: self.make("values", self))
    indices = property(lambda self: self.make("indices", self))


class Shape(tuple[Any, ...]):
    """The shape of an unknown value, of unknown numbers."""

    __slots__ = ()

    def numel(self) -> Any:
        """Their product."""
        return math.prod(self)


def kind_of(func: Callable[..., Any]) -> str:
    """What a function calls itself, an operator of ``torch.ops`` without its overload: ``add_`` of ``add_.Tensor``."""
    kind: str = getattr(func, "__name__", "").partition(".")[0]
    return kind


def name_of(func: Callable[..., Any]) -> str:
    """The name of a function, method, operator or attribute: ``mul`` for all that multiply."""
    name = kind_of(func)
    if name in ("__get__", "__set__"):
        name = func.__self__.__name__  # type: ignore[attr-defined]
    if name in ("__rdiv__", "__rtruediv__"):
        return "reciprocal"
    bare: str = name.strip("_")
    return bare[1:] if name.startswith("__") and bare[1:] in OPERATORS else bare


def bases(tensor: object) -> frozenset[int]:
    """The parameters in whose memory a tensor lies, by their ids."""
    if isinstance(tensor, Symbol):
        return tensor.parameters
    return frozenset({id(tensor)} if isinstance(tensor, nn.Parameter) else ())


def is_in_place(kind: str) -> bool:
    """Whether a method or operator changes what it is called on."""
    operator = kind.startswith("__i") and kind.strip("_")[1:] in OPERATORS
    return operator or kind in ("__setitem__", "__set__") or (kind.endswith("_") and not kind.endswith("__"))


def are_sizes(values: Sequence[object]) -> bool:
    """Whether all are numbers that are known or computed from shapes."""
    return all(one.node.is_size if isinstance(one, Symbol) else isinstance(one, (int, float)) for one in values)


def tensors_in(value: object, depth: int = DEPTH) -> Iterator[Tensor]:
    """The tensors that a value is, or holds in containers and objects within each other, so many."""
    if isinstance(value, Tensor):
        yield value
    elif depth:
        for one in inside(value):
            yield from tensors_in(one, depth - 1)
