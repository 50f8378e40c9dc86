"""Trial passes: a module's forward pass runs as far as needed, and its calls of convolutions are recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from convsim_init.layers import tree
from convsim_init.layers.forward.calls import CONVOLUTIONS, Convolution, convolution_arguments
from convsim_init.layers.forward.copies import ORIGINAL
from convsim_init.layers.forward.isolation import isolated


class NoConvolutionError(RuntimeError):
    """The forward pass called no convolution with a weight of the module's shape."""

    def __init__(self) -> None:
        super().__init__("its forward pass, in evaluation mode, called no convolution with a weight of that shape")


class Call(NamedTuple):
    """A call of a convolution in a forward pass."""

    weight: Tensor  # a copy, made at the call
    groups: int
    transposed: bool
    strides: int  # product of the strides
    fed: bool  # whether its input is computed from that of the pass, as far as derivatives show


def convolution_calls(module: nn.Module, x: Tensor, others: Collection[int] = ()) -> tuple[list[Call], bool]:
    """All calls of convolutions in a module's forward pass on x, except those with weights at other addresses.

    The weights are differentiable by the parameters that they are made of, frozen ones too. Also returned is whether
    the pass came to its end. An error of the module's code is raised only if it comes before the first call.
    """
    calls, to_the_end = list[Call](), False
    with suppress(Exception):  # such as that of code which refuses an input with a gradient
        calls, to_the_end = _calls(module, x, others, gradient=True)
    if to_the_end:
        return calls, to_the_end
    without = _calls(module, x, others, gradient=False)
    return without if len(without[0]) > len(calls) else (calls, to_the_end)


def _calls(module: nn.Module, x: Tensor, others: Collection[int], *, gradient: bool) -> tuple[list[Call], bool]:
    def train_all() -> None:
        for parameter in tree.parameters(module):
            # PyTorch lets no other parameter require a gradient.
            if parameter.is_floating_point() and not parameter.is_inference():
                parameter.requires_grad_()

    capture = _Capture(others)
    try:
        _run(module, x, capture, train_all, gradient=gradient)
    except Exception:
        if not capture.calls:
            raise
        return capture.calls, False
    return capture.calls, True


def convolution_call(
    module: nn.Module,
    shape: Sequence[int],
    x: Tensor,
    others: Collection[int] = (),
    *,
    index: int = 0,
    fed: bool = False,
    prepare: Callable[[], object] = lambda: None,
) -> Call:
    """The call of a convolution with a weight of that shape in a module's forward pass, in evaluation mode.

    The weight is differentiable by the module's parameters.

    Args:
        module: Module that calls a convolution.
        shape: Shape of the weight.
        x: Input of the pass.
        others: Addresses of weights that do not count.
        index: Position among the calls that count.
        fed: Whether only calls count whose input is computed from x.
        prepare: Function that is called right before the pass; its changes to the module are undone after it.

    Raises:
        NoConvolutionError: If there is none.
        Exception: Whatever the module's own code raises.
    """
    capture = _Capture(others, shape=torch.Size(shape), fed=fed, last=index)
    _run(module, x, capture, prepare, gradient=fed)  # a gradient only if needed, because code might refuse it
    if len(capture.calls) <= index:
        raise NoConvolutionError
    return capture.calls[index]


def _run(module: nn.Module, x: Tensor, capture: _Capture, prepare: Callable[[], object], *, gradient: bool) -> None:
    """Run a forward pass, with derivatives also in inference mode, unless the module was made in that mode."""
    tensors = (*tree.parameters(module), *tree.buffers(module))
    differentiable = not any(tensor.is_inference() for tensor in tensors)
    with torch.inference_mode(False) if differentiable else nullcontext():
        leaf = x.detach().clone().requires_grad_(gradient and differentiable and x.is_floating_point())
        capture.leaf = leaf
        with isolated(module), capture, torch.enable_grad(), suppress(_CapturedError):
            prepare()
            try:
                # PyTorch refuses to change a leaf with a gradient in place, so the module is given a clone.
                module(leaf.clone())
            except SystemExit as error:  # code may end the program at an input that it does not expect
                raise RuntimeError("its own code ended the program") from error


def leaves(tensor: Tensor) -> set[int]:
    """The ids of the leaves that a tensor is computed from; for copies that a trial made, the ids of the originals."""
    variables = [node.variable for node in _behind(tensor.grad_fn) if hasattr(node, "variable")]
    return {getattr(variable, ORIGINAL, id(variable)) for variable in variables}


def _behind(start: Any, known: Collection[Any] = ()) -> Iterator[Any]:
    """A node of the autograd graph and all nodes that it leads to; known nodes are not followed further."""
    found, pending = {start}, [start]
    for node in pending:  # grows in the loop
        yield node
        following = () if node in known else getattr(node, "next_functions", ())
        new = {following_node for following_node, _ in following} - found
        found |= new
        pending += new


def is_parameter(weight: Tensor) -> bool:
    """Whether the weight of a call is an unchanged parameter."""
    # The weight of a call is a clone, and its original is one step back.
    ((before, _),) = weight.grad_fn.next_functions if weight.grad_fn else ((None, 0),)
    parameter = getattr(before, "variable", None)
    return parameter is not None and torch.equal(parameter, weight)


class _CapturedError(BaseException):
    """Ends a forward pass at a call of a convolution; no handler of an `Exception` stops it."""


class _Capture(TorchFunctionMode):
    """Context that records the calls of convolutions.

    Weights of another shape or at the addresses `others` do not count, nor do, with `fed`, calls whose input is not
    computed from that of the pass. The call at position `last` ends the pass.
    """

    def __init__(
        self, others: Collection[int], *, shape: torch.Size | None = None, fed: bool = False, last: int | None = None
    ) -> None:
        super().__init__()
        self._others, self._shape, self._fed, self._last = others, shape, fed, last
        self.leaf: object = None  # the leaf that the input of the pass is a clone of
        self.calls: list[Call] = []
        self._known: dict[Any, bool] = {None: False}  # whether a node of the autograd graph leads to the leaf

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func in CONVOLUTIONS:
            self._note(convolution_arguments(func, args, kwargs))
            if len(self.calls) - 1 == self._last:
                raise _CapturedError
        return func(*args, **kwargs)

    def _is_fed(self, start: Any) -> bool:
        """Whether a node of the autograd graph leads to the leaf; known nodes are not searched again."""
        found = list[Any]()
        for node in _behind(start, self._known):
            if self._known.get(node) or getattr(node, "variable", None) is self.leaf:
                self._known[start] = True
                return True
            found.append(node)
        # No node that was found leads there.
        self._known |= dict.fromkeys(found, False)
        return False

    def _note(self, given: Convolution) -> None:
        weight, strides = given.weight, given.strides
        if isinstance(weight, tuple):  # a quantized weight, with its scale and more
            weight = next((part for part in weight if isinstance(part, Tensor)), torch.empty(()))
        if self._shape in (None, weight.shape) and weight.data_ptr() not in self._others:
            fed = isinstance(given.x, Tensor) and self._is_fed(given.x.grad_fn)
            if fed or not self._fed:
                # A single stride counts along each axis of the kernel.
                steps = math.prod(strides) ** (1 if len(strides) > 1 else weight.dim() - 2)
                copy = weight.clone()  # its memory will be restored after the pass
                self.calls.append(Call(copy, given.groups, given.transposed, steps, fed))
