"""Unknown values, and the calls that they come from: what code computes with them is noted, never computed."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from convsim_init.layers.forward.calls import Convolution
from convsim_init.layers.symbolic.answers import unpacked

DEPTH = 8  # of containers and objects within each other that are looked through for values
OPERATORS = {"add", "sub", "mul", "truediv", "div", "floordiv", "mod", "matmul", "pow"}  # also with an i or r before
LEFT = (nn.Module, type, FunctionType, MethodType, ModuleType)  # are not looked through


@dataclass(eq=False)
class Node:
    """A call in a forward pass, or an argument of it.

    Attributes:
        name: Of the function, method or operator; what `naming` says for a module; empty for an argument.
        inputs: The calls whose values it was given.
        learned: The parameters that it was given, by their ids.
        module: The module that was called, if it is one.
        weight: What a function that convolves was given as its weight, as a call that was given nothing else; of a
            module that convolves, if that is not its own any more.
        convolution: Of such a function what else it was given.
        changed: The parameters that it changed in place, by their ids.
        caller: The module in whose forward pass it was called.
        hook: Whether it was called in a hook of that module, and in which.
        is_size: Whether it is a number that is computed from shapes alone.
    """

    name: str
    inputs: tuple[Node, ...] = ()
    learned: frozenset[int] = frozenset()
    module: nn.Module | None = None
    weight: Node | None = None
    convolution: Convolution | None = None
    changed: frozenset[int] = frozenset()
    caller: nn.Module | None = None
    hook: str = ""
    is_size: bool = field(init=False)

    def __post_init__(self) -> None:
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

    @property
    def values(self) -> Symbol:
        """The values of what `torch.max` and others return, or of a dictionary."""
        return self.make("values", self)

    @property
    def indices(self) -> Symbol:
        """The indices of what `torch.max` and others return."""
        return self.make("indices", self)


class Shape(tuple[Any, ...]):
    """The shape of an unknown value, of unknown numbers."""

    __slots__ = ()

    def numel(self) -> Any:
        """Their product."""
        return functools.reduce(lambda one, other: one * other, self, 1)


def name_of(func: Callable[..., Any]) -> str:
    """The name of a function, method, operator or attribute: ``mul`` for all that multiply."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        name = func.__self__.__name__  # type: ignore[attr-defined]
    if name in ("__rdiv__", "__rtruediv__"):
        return "reciprocal"
    bare: str = name.strip("_")
    return bare[1:] if name.startswith("__") and bare[1:] in OPERATORS else bare


def memory(tensor: object) -> frozenset[int]:
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
        for one in _inside(value):
            yield from tensors_in(one, depth - 1)


def _inside(value: object) -> Iterable[object]:
    with suppress(Exception):  # its own code may say what it holds
        if isinstance(value, slice):
            return value.start, value.stop, value.step
        if isinstance(value, Mapping):
            return list(value.values())
        if isinstance(value, (list, tuple, set)):
            return list(value)
        return () if isinstance(value, LEFT) else list(vars(value).values())
    return ()
