"""A forward pass on values of which nothing is known: what is kept is by which functions and modules each is computed.

It needs no input. Where code asks for a truth, a number or a length, it is given one; if it then raises an error, the
module whose code that is runs again with another answer, and where none is left it counts as a single call.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial, wraps
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from convsim_init.layers import tree
from convsim_init.layers.forward.calls import CONVOLUTIONS, convolution_arguments
from convsim_init.layers.forward.isolation import running
from convsim_init.layers.symbolic.answers import Answers
from convsim_init.layers.symbolic.constants import Constants
from convsim_init.layers.symbolic.kinds import call_name
from convsim_init.layers.symbolic.results import added_dimensions, tensor_count
from convsim_init.layers.symbolic.symbols import (
    Node,
    Shape,
    Symbol,
    are_sizes,
    bases,
    is_in_place,
    kind_of,
    name_of,
    tensors_in,
)

LONGEST = 50_000  # calls in a pass, with those that were made in vain
ATTEMPTS = 30  # of one call of a module
VAIN = 3  # calls of a module that fail, before it is no longer tried
OUTPUT = "output"
RANKS = (4, 3, 5, 2, 6, 1)
ASKED = {"is_floating_point", "is_complex", "is_contiguous", "element_size", "get_device", "is_inference"}
SIZES = {"shape", "size", "dim", "ndim", "ndimension", "numel", "nelement", "stride", "len"}
ROOTS = {0.5: "sqrt", -0.5: "rsqrt"}  # by the exponents
COMPARISONS = {"eq", "ne", "lt", "gt", "le", "ge"}
VIEWS = {  # of what they are given: what is written into one is in the other
    *("getitem", "view", "view_as", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as"),
    *("t", "T", "mT", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "data", "detach"),
    *("chunk", "split", "tensor_split", "unbind", "narrow", "select", "diagonal", "unfold", "as_strided", "numpy"),
    *("storage", "untyped_storage"),
}
UNNAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)  # kinds of arguments
ORDERED = (*UNNAMED, inspect.Parameter.POSITIONAL_OR_KEYWORD)
UNWRITTEN = {"requires_grad", "retain_grad", "grad"}  # change no value
BEFORE, AFTER = "before", "after"  # a forward pass
RARE = {*COMPARISONS - {"eq"}, "any", "isnan", "isinf", "logical_not"}  # seldom true, in code that goes on
NUMBER = torch.zeros((), dtype=torch.int64, device="meta")  # what an unknown value is for PyTorch's parsers
SAMPLE = torch.empty(0, 0, device="cpu")


class EndlessError(BaseException):
    """Ends a pass that is too long; no handler of exceptions stops it."""


class FailedError(Exception):
    """Code that raises an error, whatever it is answered."""


class SymbolicPass(TorchFunctionMode):
    """Forward passes of a model, or of parts of it, on unknown values.

    Args:
        model: Copy of a model, with its hooks, on the meta device. It is changed and can be used for this alone.
        sample: What is asked of an unknown value, but for its shape, is asked of this tensor.

    Attributes:
        failed: The modules whose forward passes raised errors, each time that they were called.
        failed_hooks: The modules whose hooks did once.
    """

    def __init__(self, model: nn.Module, sample: Tensor = SAMPLE) -> None:
        super().__init__()
        self._sample = sample
        self._named: dict[nn.Module, tuple[str, bool]] = {}
        for module in list(tree.modules(model)):
            self._named[module] = call_name(module)
            for name, part in module._modules.items() if not isinstance(module, torch.jit.ScriptModule) else ():
                if isinstance(part, torch.jit.ScriptModule):  # has no forward pass that could be replaced
                    module._modules[name] = stand_in = nn.Module()
                    self._named[stand_in] = call_name(part)
        self._nodes: list[Node] = []
        self._written: list[tuple[Symbol, Node]] = []  # in place, and what it was
        self.failed, self.failed_hooks = set[nn.Module](), set[nn.Module]()
        self._failed = Counter[tuple[nn.Module, bool]]()  # the calls that did, by how truths are answered
        self._made = 0
        self._usual = True
        self._constants = Constants()
        self._answers = Answers({})
        self._running: list[tuple[nn.Module, str]] = [(model, "")]
        convolutions = [one for one in tree.modules(model) if isinstance(one, _ConvNd)]
        ranks = [len(one.kernel_size) + 2 for one in convolutions]
        # Of what rank a value is, is guessed from what most convolutions of the model take.
        self._ranks = sorted(RANKS, key=ranks.count, reverse=True)
        self._weights: dict[nn.Module, object] = {one: one._parameters.get("weight") for one in convolutions}
        self._forward = {one: one.forward for one in tree.modules(model) if not isinstance(one, torch.jit.ScriptModule)}
        for module, forward in self._forward.items():
            kind = type(module)
            if kind.__call__ is not nn.Module.__call__:
                # Python looks `__call__` up on the class, and would not see one of the module.
                module.__class__ = type(kind.__name__, (kind,), {"__call__": self._own_call(kind.__call__)})
            vars(module)["forward"] = wraps(forward)(partial(self._call, module))
            for when, hooks in ((BEFORE, module._forward_pre_hooks), (AFTER, module._forward_hooks)):
                for key, hook in hooks.items():
                    hooks[key] = partial(self._run_hook, hook, module, when)

    def __deepcopy__(self, memo: object) -> SymbolicPass:
        """Itself, which the modules know that code may copy."""
        return self

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
        self._running = [(part, "")]
        unknown = {name: self.symbol() for name in given}
        kinds = {name: one.kind for name, one in inspect.signature(part.forward).parameters.items()}
        first = list(takewhile(unknown.__contains__, (name for name, kind in kinds.items() if kind in ORDERED)))
        args = [unknown[name] for name in first]  # in order, as they usually are given and hooks expect them
        kwargs = {name: one for name, one in unknown.items() if name not in first and kinds[name] not in UNNAMED}
        with self, running(()):  # also: what ran before may have imported the compiler
            try:
                output = self._attempt(part, args, kwargs)
            except (FailedError, EndlessError):
                self.failed.add(part)
                return []
        self.failed.discard(part)
        self.symbol(OUTPUT, output)
        return self._nodes

    def symbol(self, name: str = "", *given: Any, **more: Any) -> Symbol:
        """The value of a call that was given these values."""
        self._limit()
        inputs, learned, tensors = dict[Node, None](), set[int](), list(tensors_in(given))
        for one in tensors:
            if isinstance(one, Symbol):
                inputs[one.node] = None
            elif isinstance(one, nn.Parameter):
                learned.add(id(one))
        with torch._C.DisableTorchFunction():
            symbol: Symbol = Tensor._make_subclass(Symbol, NUMBER)
            caller, hook = self._running[-1]
            symbol.node = Node(name, tuple(inputs), frozenset(learned), caller=caller, hook=hook, **more)
            viewed = tensors[0] if tensors and name in VIEWS else None
            symbol.base, symbol.parameters = viewed if isinstance(viewed, Symbol) else None, bases(viewed)
            symbol.make = self.symbol
        self._nodes.append(symbol.node)
        return symbol

    def _limit(self) -> None:
        self._made += 1
        if self._made > LONGEST:
            raise EndlessError

    def _call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A module's forward pass."""
        if module not in self._forward:  # a copy that code has made of one
            return type(module).forward(module, *args, **kwargs)
        name, single = self._named[module]
        if {one for one, _ in self._running} == {module}:  # with which the pass began
            return self._attempt(self._forward[module], args, kwargs, module)
        if not single and self._failed[module, self._usual] < VAIN:
            try:
                output = self._attempt(self._forward[module], args, kwargs, module)
                self.failed.discard(module)
                return output
            except FailedError:
                self._failed[module, self._usual] += 1
                self.failed.add(module)
        symbol = self.symbol(name, args, kwargs, module=module)
        if module in self._weights:
            weight = module._parameters.get("weight")
            if weight is not self._weights[module] or isinstance(weight, Symbol):  # as after torch.utils.swap_tensors
                symbol.node.weight = self.symbol("weight", weight).node
        return symbol

    def _own_call(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """What a class does around its forward pass, as a method."""

        def own_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self._attempt(partial(call, module), args, kwargs, module)

        return own_call

    def _run_hook(self, hook: Callable[..., Any], module: nn.Module, when: str, *args: Any, **kwargs: Any) -> Any:
        """A hook before or after the forward pass of a module, which goes on where that fails."""
        try:
            return self._attempt(hook, args, kwargs, module, when)
        except FailedError:
            self.failed_hooks.add(module)
            return None

    def _attempt(
        self,
        forward: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        caller: nn.Module | None = None,
        hook: str = "",
    ) -> Any:
        """Run code of a module, with other answers to its questions where it fails; a `FailedError` if with all."""
        outer, before, unwritten = self._answers, len(self._nodes), len(self._written)
        self._answers = answers = Answers(outer.proven)  # those of this call are changed alone
        entered = len(self._running)
        self._running += [(caller, hook)] if caller in self._forward else []
        try:
            for _ in range(ATTEMPTS):
                try:
                    output = forward(*args, **kwargs)
                    answers.prove()
                    return output
                except (Exception, SystemExit) as error:  # of any kind: what code does with values that are not there
                    # The next attempt begins where this one did: what it noted was in vain.
                    del self._nodes[before:]
                    for symbol, node in reversed(self._written[unwritten:]):
                        symbol.node = node
                    del self._written[unwritten:]
                    if not answers.change(error):
                        break
            raise FailedError
        finally:
            self._answers = outer
            del self._running[entered:]

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """What a function of PyTorch returns."""
        kwargs = kwargs or {}
        name, kind = name_of(func), kind_of(func)
        first = args[0] if args else None
        if name == "device":
            return self._sample.device
        # That of `torch.cond`, which is given code of the model for either case.
        if name == "cond" and isinstance(func, HigherOrderOperator):
            _, here, there, operands = args
            with self:  # no mode sees what is called in it
                there(*operands)
                return here(*operands)
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
        args, kwargs = self._constants.as_they_are_now(args, kwargs)
        written = kwargs.get("out", next(iter([*args, *kwargs.values()]), None) if is_in_place(kind) else None)
        if not isinstance(first, Symbol) and self._constants.are_made_by(name, written, args, kwargs):
            self._limit()
            with suppress(Exception):  # what cannot be computed here is as good as unknown
                return self._constants.compute(func, args, kwargs)
        if name == "pow" and len(args) > 1 and isinstance(args[1], float):
            name = ROOTS.get(args[1], name)
        args = args[:1] if name == "deepcopy" else args  # what is copied, and not all that has been
        symbol = self.symbol(name, args, kwargs, added=added_dimensions(name, args, kwargs))
        if func in CONVOLUTIONS:
            symbol.node.convolution = convolution_arguments(func, args, kwargs)
            symbol.node.weight = self.symbol("weight", symbol.node.convolution.weight).node
        count = tensor_count(name, args, kwargs)
        if count is not None:
            return tuple(self.symbol("getitem", symbol) for _ in range(count))
        if written is not None and name not in UNWRITTEN:
            symbol.node.changed = frozenset().union(*map(bases, tensors_in(written)))
            self._constants.note_written(written, symbol)
        return self._write(written, symbol) if isinstance(written, Symbol) else symbol

    def _write(self, written: Symbol, by: Symbol) -> Symbol:
        """Let a value be what a call makes of it in place, and with it those that it is a view of."""
        self._written.append((written, written.node))
        written.node = by.node
        # What is written into a view is in what it views, and in what that views, in turn.
        if written.base is not None:
            self._write(written.base, self.symbol("setitem", written.base, by))
        return written

    def _answer(self, kind: str, name: str, asked: Symbol, *more: Any) -> Any:
        """What is told of an unknown value where code needs a value; None where it does not."""
        give = self._answers.give
        if kind == "__bool__" or (name in COMPARISONS and are_sizes([asked, *more])):
            single = name == "eq" and type(more[0]) is int and more[0] == 1  # such as an image of one pixel
            likely = (not single and (asked.node.name if kind == "__bool__" else name) not in RARE) == self._usual
            return give(likely, not likely)
        if name in ("dim", "ndim", "ndimension") or (name in ("shape", "size") and not more):
            node, added = asked.node, 0
            while node.added and node.inputs:
                node, added = node.inputs[0], added + node.added
            rank = self._answers.rank(node, self._ranks, added)
            return rank if "dim" in name else Shape(self.symbol("size", asked) for _ in range(rank))
        # An imaginary part is a tensor, too, though the sample, which is real, has none.
        if (kind == "__get__" and name != "imag") or name in ASKED:
            value = getattr(self._sample, name)
            value = value() if callable(value) else value
            return None if isinstance(value, Tensor) else value
        if kind in ("__format__", "__repr__", "__str__"):
            return "unknown"
        choices = {"__contains__": (True, False), "__len__": (1, 2, 3, 4), "__index__": (2, 1, 0), "__int__": (2, 1, 0)}
        values = {"__hash__": id(asked), "__float__": 1.0}
        return give(*choices[kind]) if kind in choices else values.get(kind)
