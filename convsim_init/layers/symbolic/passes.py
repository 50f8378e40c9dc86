"""A symbolic forward pass: its values are unknown, and only the calls that compute each of them are recorded.

It needs no input. A function mode answers every call of PyTorch with a `Symbol`, and all modules of a copy of the model
have a forward pass that calls `SymbolicPass`. Where code asks for a truth, a number or a length, it is given an answer.
If it raises an error later, the innermost module around runs again with another answer. If no answer is left, the call
of that module counts as a single call, whose inside is unknown.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial, wraps
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from convsim_init.layers import tree
from convsim_init.layers.forward.calls import CONVOLUTIONS, convolution_arguments, per_axis
from convsim_init.layers.forward.isolation import running
from convsim_init.layers.symbolic.answers import Answers
from convsim_init.layers.symbolic.constants import Constants
from convsim_init.layers.symbolic.kinds import call_name
from convsim_init.layers.symbolic.results import added_dimensions, tensor_count
from convsim_init.layers.symbolic.symbols import Node, Shape, Symbol, bases, is_in_place, kind_of, name_of, tensors_in

MAX_CALLS = 50_000  # in a pass, including those of failed attempts
ATTEMPTS = 30  # for one call of a module
MAX_FAILED = 3  # calls of a module, after which it is no longer tried
OUTPUT = "output"
RANKS = (4, 3, 5, 2, 6, 1)
ASKED = {"is_floating_point", "is_complex", "is_contiguous", "element_size", "get_device", "is_inference"}
SIZES = {"shape", "size", "dim", "ndim", "ndimension", "numel", "nelement", "stride", "len"}
ROOTS = {0.5: "sqrt", -0.5: "rsqrt"}  # by exponent of `pow`
COMPARISONS = {"eq", "ne", "lt", "gt", "le", "ge"}
VIEWS = {  # functions whose result shares memory with their first argument
    *("getitem", "view", "view_as", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as"),
    *("t", "T", "mT", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "data", "detach"),
    *("chunk", "split", "tensor_split", "unbind", "narrow", "select", "diagonal", "unfold", "as_strided", "numpy"),
    *("storage", "untyped_storage"),
}
UNNAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)  # kinds of arguments
ORDERED = (*UNNAMED, inspect.Parameter.POSITIONAL_OR_KEYWORD)
UNWRITTEN = {"requires_grad", "retain_grad", "grad"}  # in-place methods that change no value
BEFORE, AFTER = "before", "after"  # hooks before and after a forward pass
RARE = {*COMPARISONS - {"eq"}, "any", "isnan", "isinf", "logical_not"}  # conditions that are seldom true
NUMBER = torch.zeros((), dtype=torch.int64, device="meta")  # the tensor of every symbol: argument parsers accept it
SAMPLE = torch.empty(0, 0, device="cpu")


class EndlessError(BaseException):
    """Ends a pass that is too long; no handler of an `Exception` stops it."""


class FailedError(Exception):
    """Raised for code that raises an error with every answer."""


class SymbolicPass(TorchFunctionMode):
    """Forward passes of a model, or of parts of it, on unknown values.

    Args:
        model: Copy of a model, with its hooks, on the meta device. It is changed, and of no other use afterwards.
        sample: Tensor whose dtype, device and other properties unknown values seem to have.

    Attributes:
        failed: The modules whose forward passes raised errors in their last calls.
        failed_hooks: The modules whose hooks raised an error in any call.
    """

    def __init__(self, model: nn.Module, sample: Tensor = SAMPLE) -> None:
        super().__init__()
        self._sample = sample
        self._named: dict[nn.Module, tuple[str, bool]] = {}  # `call_name` of each module
        for module in list(tree.modules(model)):
            self._named[module] = call_name(module)
            for name, part in module._modules.items() if not isinstance(module, torch.jit.ScriptModule) else ():
                if isinstance(part, torch.jit.ScriptModule):  # its forward pass cannot be replaced
                    module._modules[name] = stand_in = nn.Module()
                    self._named[stand_in] = call_name(part)
        self._nodes: list[Node] = []  # the calls so far
        self._written: list[tuple[Symbol, Node]] = []  # symbols that were changed in place, with their calls before
        self.failed, self.failed_hooks = set[nn.Module](), set[nn.Module]()
        self._failed = Counter[tuple[nn.Module, bool]]()  # number of failed calls, by module and `usual`
        self._made = 0  # number of calls, including those of failed attempts
        self._usual = True
        self._constants = Constants()
        self._answers = Answers({})
        self._running: list[tuple[nn.Module, str]] = [(model, "")]  # the modules whose code runs, with the kind of hook
        convolutions = [module for module in tree.modules(model) if isinstance(module, _ConvNd)]
        ranks = [len(per_axis(module, "kernel_size")) + 2 for module in convolutions]
        # The first guess for the rank of a value is what most convolutions of the model take.
        self._ranks = sorted(RANKS, key=ranks.count, reverse=True)
        self._weights: dict[nn.Module, object] = {module: module._parameters.get("weight") for module in convolutions}
        self._forward = {m: m.forward for m in tree.modules(model) if not isinstance(m, torch.jit.ScriptModule)}
        for module, forward in self._forward.items():
            kind = type(module)
            if kind.__call__ is not nn.Module.__call__:
                # Python looks `__call__` up on the class, not on the module.
                module.__class__ = type(kind.__name__, (kind,), {"__call__": self._own_call(kind.__call__)})
            vars(module)["forward"] = wraps(forward)(partial(self._call, module))
            for when, hooks in ((BEFORE, module._forward_pre_hooks), (AFTER, module._forward_hooks)):
                for key, hook in hooks.items():
                    hooks[key] = partial(self._run_hook, hook, module, when)

    def __deepcopy__(self, memo: object) -> SymbolicPass:
        """Return the pass itself: code may copy modules, which refer to it."""
        return self

    def run(self, part: nn.Module, given: Iterable[str], *, usual: bool = True) -> list[Node]:
        """The calls in a forward pass in order, with its output as the last one; none if it cannot run.

        Args:
            part: The model or a module of it.
            given: The names of the arguments that are given; the others keep their defaults.
            usual: Whether the first answer for a truth is the usual one, or else the opposite.
        """
        if part not in self._forward:
            return []
        self._usual = usual
        self._nodes, self._written, self._made, self._answers = [], [], 0, Answers({})
        self._running = [(part, "")]
        unknown = {name: self.symbol() for name in given}
        kinds = {name: parameter.kind for name, parameter in inspect.signature(part.forward).parameters.items()}
        first = list(takewhile(unknown.__contains__, (name for name, kind in kinds.items() if kind in ORDERED)))
        args = [unknown[name] for name in first]  # by position if possible, because hooks expect that
        kwargs = {name: value for name, value in unknown.items() if name not in first and kinds[name] not in UNNAMED}
        with self, running(()):  # code of an earlier pass may have imported the compiler
            try:
                output = self._attempt(part, args, kwargs)
            except (FailedError, EndlessError):
                self.failed.add(part)
                return []
        self.failed.discard(part)
        self.symbol(OUTPUT, output)
        return self._nodes

    def symbol(self, name: str = "", *given: Any, **more: Any) -> Symbol:
        """Record a call with these arguments, and return a symbol for its value; `more` are fields of its node."""
        self._count_call()
        inputs, learned, tensors = dict[Node, None](), set[int](), list(tensors_in(given))
        for tensor in tensors:
            if isinstance(tensor, Symbol):
                inputs[tensor.node] = None
            elif isinstance(tensor, nn.Parameter):
                learned.add(id(tensor))
        with torch._C.DisableTorchFunction():
            symbol: Symbol = Tensor._make_subclass(Symbol, NUMBER)
            caller, hook = self._running[-1]
            symbol.node = Node(name, tuple(inputs), frozenset(learned), caller=caller, hook=hook, **more)
            viewed = tensors[0] if tensors and name in VIEWS else None
            symbol.base, symbol.parameters = viewed if isinstance(viewed, Symbol) else None, bases(viewed)
            symbol.make = self.symbol
        self._nodes.append(symbol.node)
        return symbol

    def _count_call(self) -> None:
        self._made += 1
        if self._made > MAX_CALLS:
            raise EndlessError

    def _call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Replace a module's forward pass: follow its code, or record a single call if that is not wanted or fails."""
        if module not in self._forward:  # a copy of a module, made by the model's code
            return type(module).forward(module, *args, **kwargs)
        name, single = self._named[module]
        if {running_module for running_module, _ in self._running} == {module}:  # the module that the pass is about
            return self._attempt(self._forward[module], args, kwargs, module)
        if not single and self._failed[module, self._usual] < MAX_FAILED:
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
            # The same parameter may have become a symbol by torch.utils.swap_tensors.
            if weight is not self._weights[module] or isinstance(weight, Symbol):
                symbol.node.weight = self.symbol("weight", weight).node
        return symbol

    def _own_call(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A method that runs a class's own ``__call__``, which it has instead of PyTorch's."""

        def own_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self._attempt(partial(call, module), args, kwargs, module)

        return own_call

    def _run_hook(self, hook: Callable[..., Any], module: nn.Module, when: str, *args: Any, **kwargs: Any) -> Any:
        """Run a hook before or after the forward pass of a module; a hook that fails is skipped."""
        try:
            return self._attempt(hook, args, kwargs, module, when)
        except (FailedError, TypeError):
            self.failed_hooks.add(module)
            return None

    def _attempt(
        self, code: Callable[..., Any], args: Any, kwargs: Any, caller: nn.Module | None = None, hook: str = ""
    ) -> Any:
        """Run code of a module; after an error run it again with another answer, until a `FailedError` if none is left.

        Only answers to questions that were asked in this call are changed. Before the next attempt the record is reset
        to the beginning of the call: the nodes, and the symbols that were written to in place.
        """
        outer, before, unwritten = self._answers, len(self._nodes), len(self._written)
        self._answers = answers = Answers(outer.proven)
        entered = len(self._running)
        self._running += [(caller, hook)] if caller in self._forward else []
        try:
            for _ in range(ATTEMPTS):
                try:
                    output = code(*args, **kwargs)
                    answers.prove()
                    return output
                except (Exception, SystemExit) as error:  # of any kind, because the answers may make no sense
                    if _is_refusal(error):
                        raise
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
        """Handle a call of a function of PyTorch.

        A question about an unknown value is answered, a property of a known tensor read, a function of known values
        computed (see `Constants`). Any other call is recorded and returns symbols; in place it also changes one.
        """
        kwargs = kwargs or {}
        name, kind = name_of(func), kind_of(func)
        first = args[0] if args else None
        if name == "device":
            return self._sample.device
        if name == "parse_to":  # of the arguments of `Module.to`
            return func(*(self._sample if isinstance(arg, Symbol) else arg for arg in args), **kwargs)
        # The operator of `torch.cond` is given code of the model for both cases, and both are recorded.
        if name == "cond" and isinstance(func, HigherOrderOperator):
            _, if_true, if_false, operands = args
            with self:  # a mode is off while it handles a call
                if_false(*operands)
                return if_true(*operands)
        if not isinstance(first, Symbol):
            state = first is None and name.startswith(("set_", "is_", "get_"))  # such as whether gradients are enabled
            if state or (isinstance(first, Tensor) and (kind == "__get__" or name in SIZES | ASKED)):
                value = func(*args, **kwargs)
                if not isinstance(value, Tensor):
                    return value
        else:
            known = self._answer(kind, name, first, *args[1:], *kwargs)
            if known is not None:
                return known
        args, kwargs = self._constants.updated(args, kwargs)
        called_on = next(iter([*args, *kwargs.values()]), None)
        written = kwargs.get("out", called_on if is_in_place(kind) else None)
        if not isinstance(first, Symbol) and self._constants.can_compute(name, written, args, kwargs):
            self._count_call()
            with suppress(Exception):  # a value that cannot be computed counts as unknown
                return self._constants.compute(func, args, kwargs)
        if name == "pow" and len(args) > 1 and isinstance(args[1], float):
            name = ROOTS.get(args[1], name)
        args = args[:1] if name == "deepcopy" else args  # without the memo of all earlier copies
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
        """Let a symbol stand for the result of a call that changed it in place, and update the bases of a view."""
        self._written.append((written, written.node))
        written.node = by.node
        # Writing into a view changes its base too, and the base of that in turn.
        if written.base is not None:
            self._write(written.base, self.symbol("setitem", written.base, by))
        return written

    def _answer(self, kind: str, name: str, asked: Symbol, *more: Any) -> Any:
        """The answer to a question about an unknown value, such as its truth or a size; None if it is no question."""
        give = self._answers.give
        if kind == "__bool__" or (name in COMPARISONS and _are_sizes([asked, *more])):
            condition = asked.node.name if kind == "__bool__" else name
            is_one = name == "eq" and type(more[0]) is int and more[0] == 1  # such as an image of one pixel
            likely = (condition not in RARE and not is_one) == self._usual
            return give(likely, not likely)
        if name in ("dim", "ndim", "ndimension") or (name in ("shape", "size") and not more):
            node, added = asked.node, 0
            while node.added and node.inputs:
                node, added = node.inputs[0], added + node.added
            rank = self._answers.rank(node, self._ranks, added)
            return rank if "dim" in name else Shape(self.symbol("size", asked) for _ in range(rank))
        # `imag` is a tensor, but a real sample has no such attribute.
        if (kind == "__get__" and name != "imag") or name in ASKED:
            value = getattr(self._sample, name)
            value = value() if callable(value) else value
            return None if isinstance(value, Tensor) else value
        if kind in ("__format__", "__repr__", "__str__"):
            return "unknown"
        choices = {"__contains__": (True, False), "__len__": (1, 2, 3, 4), "__index__": (2, 1, 0), "__int__": (2, 1, 0)}
        values: dict[str, Any] = {"__hash__": id(asked), "__float__": 1.0}
        if asked.node.is_size:  # of other values NumPy's functions are unknown
            values["__array__"] = np.ones((), dtype=int)
        return give(*choices[kind]) if kind in choices else values.get(kind)


def _are_sizes(values: Sequence[object]) -> bool:
    """Whether all are numbers that are known or computed from shapes."""
    return all(v.node.is_size if isinstance(v, Symbol) else isinstance(v, (int, float)) for v in values)


def _is_refusal(error: BaseException) -> bool:
    """Whether code refused arguments before it began, as in a real pass, where its caller may try others."""
    # Too few may come from an unknown value that was unpacked into one.
    began = error.__traceback__ is not None and error.__traceback__.tb_next is not None
    return isinstance(error, TypeError) and not began and "missing" not in str(error)
