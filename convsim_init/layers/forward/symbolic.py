"""A forward pass on values of which nothing is known: what is kept is by which functions and modules each is computed.

It needs no input. Where code asks for a truth, a number or a length, it is given one; if it then raises an error, the
module whose code that is runs again with another answer, and where none is left it counts as a single call.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from convsim_init.layers import tree
from convsim_init.layers.code.bytecode import unpacked
from convsim_init.layers.code.reading import CONVOLUTIONS
from convsim_init.layers.forward.answers import Answers
from convsim_init.layers.forward.isolation import not_compiled
from convsim_init.layers.forward.trial import convolution_arguments

LONGEST = 50_000  # calls in a pass, with those that were made in vain
ATTEMPTS = 30  # of one call of a module
VAIN = 3  # calls of a module that fail, before it is no longer tried
DEPTH = 4  # of objects within objects that are looked through for values
OUTPUT = "output"
RANKS = (4, 3, 5, 2)
ASKED = {"is_floating_point", "is_complex", "is_contiguous", "element_size", "get_device", "is_inference"}
SIZES = {"shape", "size", "dim", "ndim", "ndimension", "numel", "nelement", "stride", "len"}
OPERATORS = {"add", "sub", "mul", "truediv", "div", "floordiv", "mod", "matmul", "pow"}  # also with an i or r before
ROOTS = {0.5: "sqrt", -0.5: "rsqrt"}  # by the exponents
COMPARISONS = {"eq", "ne", "lt", "gt", "le", "ge"}
VIEWS = {  # of what they are given: what is written into one is in the other
    *("getitem", "view", "view_as", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as"),
    *("t", "T", "mT", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "data", "detach"),
    *("chunk", "split", "tensor_split", "unbind", "narrow", "select", "diagonal", "unfold", "as_strided"),
}
RARE = {*COMPARISONS - {"eq"}, "any", "isnan", "isinf", "logical_not"}  # seldom true, in code that goes on
NUMBER = torch.zeros((), dtype=torch.int64, device="meta")  # what an unknown value is for PyTorch's parsers
SAMPLE = torch.empty(0, 0)  # what is asked of an unknown value, but for its shape, is asked of this one
LEFT = (nn.Module, type, FunctionType, MethodType, ModuleType)  # are not looked through


class EndlessError(BaseException):
    """Ends a pass that is too long; no handler of exceptions stops it."""


class FailedError(Exception):
    """Code that raises an error, whatever it is answered."""


@dataclass(eq=False)
class Node:
    """A call in a forward pass, or an argument of it.

    Attributes:
        name: Of the function, method or operator; what `naming` says for a module; empty for an argument.
        inputs: The calls whose values it was given.
        learned: The parameters that it was given, by their ids.
        module: The module that was called, if it is one.
        weight: What a function that convolves was given as its weight, as a call that was given nothing else.
        is_size: Whether it is a number that is computed from shapes alone.
    """

    name: str
    inputs: tuple[Node, ...] = ()
    learned: frozenset[int] = frozenset()
    module: nn.Module | None = None
    weight: Node | None = None
    is_size: bool = field(init=False)

    def __post_init__(self) -> None:
        operator = self.name in OPERATORS and bool(self.inputs)
        self.is_size = self.name == "size" or (operator and all(one.is_size for one in self.inputs))


class Symbol(Tensor):
    """An unknown value, perhaps a view of another one."""

    node: Node
    base: Symbol | None
    made_by: SymbolicPass

    def __getattr__(self, name: str) -> Symbol:
        if name.startswith("_") or (self.node.module is None and self.node.name not in ("", "getitem")):
            # What functions return are tensors.
            raise AttributeError(name)
        return self.made_by.symbol(name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Symbol:
        """Call what an unknown object holds."""
        return self.made_by.symbol(self.node.name, self, args, kwargs)

    def __iter__(self) -> Iterator[Symbol]:
        """As many values as the code unpacks, or else one."""
        frame = sys._getframe(1)
        return iter([self.made_by.symbol("getitem", self) for _ in range(unpacked(frame.f_code, frame.f_lasti))])

    @classmethod
    def __torch_dispatch__(cls, func: object, *_: object) -> Any:
        """Refuse what compiled code computes, of which nothing would be known."""
        raise TypeError(f"{func} of an unknown value")

    @property
    def values(self) -> Symbol:
        """The values of what `torch.max` and others return, or of a dictionary."""
        return self.made_by.symbol("values", self)

    @property
    def indices(self) -> Symbol:
        """The indices of what `torch.max` and others return."""
        return self.made_by.symbol("indices", self)


class Shape(tuple[Any, ...]):
    """The shape of an unknown value, of unknown numbers."""

    __slots__ = ()

    def numel(self) -> Any:
        """Their product."""
        return functools.reduce(lambda one, other: one * other, self, 1)


class SymbolicPass(TorchFunctionMode):
    """Forward passes of a model, or of parts of it, on unknown values.

    Args:
        model: Model without hooks, its tensors on the meta device. It is changed and can be used for this alone.
        naming: What the call of a module is to be called, and whether it counts as a single one in any case.
    """

    def __init__(self, model: nn.Module, naming: Callable[[nn.Module], tuple[str, bool]]) -> None:
        super().__init__()
        self._named: dict[nn.Module, tuple[str, bool]] = {}
        for module in list(tree.modules(model)):
            self._named[module] = naming(module)
            for name, part in module._modules.items() if not isinstance(module, torch.jit.ScriptModule) else ():
                if isinstance(part, torch.jit.ScriptModule):  # has no forward pass that could be replaced
                    module._modules[name] = stand_in = nn.Module()
                    self._named[stand_in] = naming(part)
        self._nodes: list[Node] = []
        self._written: list[tuple[Symbol, Node]] = []  # in place, and what it was
        self._failed = Counter[tuple[nn.Module, bool]]()  # the calls that did, by how truths are answered
        self._made = 0
        self._usual = True
        self._answers = Answers({})
        ranks = [len(one.kernel_size) + 2 for one in tree.modules(model) if isinstance(one, _ConvNd)]
        self._ranks = sorted(RANKS, key=ranks.count, reverse=True)
        self._forward = {one: one.forward for one in tree.modules(model) if not isinstance(one, torch.jit.ScriptModule)}
        for module, forward in self._forward.items():
            vars(module)["forward"] = functools.wraps(forward)(functools.partial(self._call, module))

    def run(self, part: nn.Module, given: Iterable[str], *, usual: bool = True) -> list[Node]:
        """The calls of a part's forward pass in order, its output the last; none if it cannot run.

        Args:
            part: The model or a module of it.
            given: The names of the arguments that are given; the others have their defaults.
            usual: Whether truths are answered with what is usual first, and not with the opposite.
        """
        if part not in self._forward:
            return []
        self._usual = usual
        self._nodes, self._written, self._made, self._answers = [], [], 0, Answers({})
        parameters = inspect.signature(part.forward).parameters
        unnamed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY)
        args = [self.symbol() for name in given if parameters[name].kind in unnamed]
        kwargs = {name: self.symbol() for name in given if parameters[name].kind not in unnamed}
        with self, not_compiled():
            try:
                output = self._attempt(self._forward[part], args, kwargs)
            except (FailedError, EndlessError):
                return []
        self.symbol(OUTPUT, output)
        return self._nodes

    def symbol(self, name: str = "", *given: Any, **more: Any) -> Symbol:
        """The value of a call that was given these values."""
        self._made += 1
        if self._made > LONGEST:
            raise EndlessError
        inputs, learned, tensors = dict[Node, None](), set[int](), list(tensors_in(given))
        for one in tensors:
            if isinstance(one, Symbol):
                inputs[one.node] = None
            elif isinstance(one, nn.Parameter):
                learned.add(id(one))
        with torch._C.DisableTorchFunction():
            symbol: Symbol = Tensor._make_subclass(Symbol, NUMBER)
            symbol.node, symbol.made_by = Node(name, tuple(inputs), frozenset(learned), **more), self
            symbol.base = next((one for one in tensors[:1] if name in VIEWS and isinstance(one, Symbol)), None)
        self._nodes.append(symbol.node)
        return symbol

    def _call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A module's forward pass."""
        name, single = self._named[module]
        if not single and self._failed[module, self._usual] < VAIN:
            try:
                return self._attempt(self._forward[module], args, kwargs)
            except FailedError:
                self._failed[module, self._usual] += 1
        return self.symbol(name, args, kwargs, module=module)

    def _attempt(self, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run code, with other answers to its questions where it fails.

        Raises:
            FailedError: If it fails with all of them.
        """
        outer, before, unwritten = self._answers, len(self._nodes), len(self._written)
        self._answers = answers = Answers(outer.proven)  # those of this call are changed alone
        try:
            for _ in range(ATTEMPTS):
                try:
                    output = forward(*args, **kwargs)
                    answers.prove()
                    return output
                except (Exception, SystemExit) as error:  # of any kind: what code does with values that are not there
                    del self._nodes[before:]
                    for symbol, node in reversed(self._written[unwritten:]):
                        symbol.node = node
                    del self._written[unwritten:]
                    if not answers.change(error):
                        break
            raise FailedError
        finally:
            self._answers = outer

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """What a function of PyTorch returns."""
        kwargs = kwargs or {}
        name, kind = name_of(func), getattr(func, "__name__", "")
        first = args[0] if args else None
        if name == "device":
            return SAMPLE.device
        if not isinstance(first, Symbol):
            state = first is None and name.startswith(("set_", "is_", "get_"))  # such as whether gradients are kept
            if state or (isinstance(first, Tensor) and (kind == "__get__" or name in SIZES | ASKED)):
                value = func(*args, **kwargs)
                if not isinstance(value, Tensor):
                    return value
        else:
            known = self._answer(kind, name, first, *args[1:], *kwargs)
            if known is not None:
                return known
        exponent = args[1] if name == "pow" and len(args) > 1 else None
        if isinstance(exponent, float):
            name = ROOTS.get(exponent, name)
        symbol = self.symbol(name, args, kwargs)
        if func in CONVOLUTIONS:
            symbol.node.weight = self.symbol("weight", convolution_arguments(func, args, kwargs)[1]).node
        count = _count(name, args, kwargs)
        if count is not None:
            return tuple(self.symbol("getitem", symbol) for _ in range(count))
        written = kwargs.get("out", first if is_in_place(kind) else None)
        return self._write(written, symbol) if isinstance(written, Symbol) else symbol

    def _write(self, written: Symbol, by: Symbol) -> Symbol:
        """Let a value be what a call makes of it in place, and with it those that it is a view of."""
        self._written.append((written, written.node))
        written.node = by.node
        if written.base is not None:
            self._write(written.base, self.symbol("setitem", written.base, by))
        return written

    def _answer(self, kind: str, name: str, asked: Symbol, *more: Any) -> Any:
        """What is told of an unknown value where code needs a value; None where it does not."""
        give = self._answers.give
        if kind == "__bool__" or (name in COMPARISONS and _are_sizes([asked, *more])):
            single = name == "eq" and type(more[0]) is int and more[0] == 1  # such as an image of one pixel
            likely = (not single and (asked.node.name if kind == "__bool__" else name) not in RARE) == self._usual
            return give(likely, not likely)
        if name in ("dim", "ndim", "ndimension") or (name in ("shape", "size") and not more):
            rank = self._answers.rank(asked.node, self._ranks)
            return rank if "dim" in name else Shape(self.symbol("size", asked) for _ in range(rank))
        if kind == "__get__" or name in ASKED:
            value = getattr(SAMPLE, name)
            value = value() if callable(value) else value
            return None if isinstance(value, Tensor) else value
        if kind in ("__format__", "__repr__", "__str__"):
            return "unknown"
        choices = {"__contains__": (True, False), "__len__": (1, 2, 3, 4), "__index__": (2, 1, 0), "__int__": (2, 1, 0)}
        values = {"__hash__": id(asked), "__float__": 1.0}
        return give(*choices[kind]) if kind in choices else values.get(kind)


def name_of(func: Callable[..., Any]) -> str:
    """The name of a function, method, operator or attribute: ``mul`` for all that multiply."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        name = func.__self__.__name__  # type: ignore[attr-defined]
    if name in ("__rdiv__", "__rtruediv__"):
        return "reciprocal"
    bare: str = name.strip("_")
    return bare[1:] if name.startswith("__") and bare[1:] in OPERATORS else bare


def _count(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """How many tensors a function returns, where that is seen from what it is given."""
    if name in ("meshgrid", "broadcast_tensors"):
        return len(args[0] if isinstance(args[0], (list, tuple)) else args)
    if name in ("chunk", "unsafe_chunk", "split", "split_with_sizes", "tensor_split"):
        parts = next(iter([*args[1:2], *(value for key, value in kwargs.items() if key != "dim")]), None)
        if isinstance(parts, (list, tuple)):
            return len(parts) + (name == "tensor_split")
        return parts if isinstance(parts, int) and name != "split" else None
    return None


def is_in_place(kind: str) -> bool:
    """Whether a method or operator changes what it is called on."""
    operator = kind.startswith("__i") and kind.strip("_")[1:] in OPERATORS
    return operator or kind in ("__setitem__", "__set__") or (kind.endswith("_") and not kind.endswith("__"))


def _are_sizes(values: Sequence[object]) -> bool:
    return all(one.node.is_size if isinstance(one, Symbol) else isinstance(one, (int, float)) for one in values)


def tensors_in(value: object, depth: int = DEPTH) -> Iterator[Tensor]:
    """The tensors that a value holds."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, set, Mapping, slice)):
        inside: Any = (value.start, value.stop, value.step) if isinstance(value, slice) else value
        for one in inside.values() if isinstance(value, Mapping) else inside:
            yield from tensors_in(one, depth)
    elif depth and hasattr(value, "__dict__") and not isinstance(value, LEFT):
        for one in vars(value).values():
            yield from tensors_in(one, depth - 1)
