"""A trial pass: a module's forward pass runs as far as it is needed, and what it gives to convolutions is kept."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from convsim_init.layers import tree
from convsim_init.layers.forward.calls import CONVOLUTIONS, convolution_arguments
from convsim_init.layers.forward.copies import ORIGINAL
from convsim_init.layers.forward.isolation import draw_numbers, isolated

NO_CALL = "its forward pass, in evaluation mode, called no convolution with a weight of that shape"


class NoConvolutionError(RuntimeError):
    """The forward pass called no convolution with a weight of the module's shape."""


class Call(NamedTuple):
    """What a forward pass gives to a convolution.

    Attributes:
        weight: The weight at that moment; it shares no memory with the module.
        groups: Groups of the convolution.
        transposed: Whether it is a transposed convolution.
        strides: Product of its strides.
        fed: Whether its input is computed from that of the pass, as far as derivatives tell.
    """

    weight: Tensor
    groups: int
    transposed: bool
    strides: int
    fed: bool


def convolution_calls(module: nn.Module, x: Tensor, others: Collection[int] = ()) -> tuple[list[Call], bool]:
    """All that a module's forward pass gives to convolutions, from an input.

    The weights are differentiable by the parameters that they are made of, frozen ones too.

    Args:
        module: Module that calls convolutions.
        x: Input of the pass.
        others: Addresses of weights that do not count.

    Returns:
        The calls, and whether the pass came to its end: an error after a call is none here.

    Raises:
        Exception: Whatever the module's own code raises before the first call.
    """
    calls, to_the_end = list[Call](), False
    with _recording(module):
        with contextlib.suppress(Exception):  # also that of code which refuses an input with a gradient
            calls, to_the_end = _calls(module, _leaf(module, x), others)
        if to_the_end:
            return calls, to_the_end
        without = _calls(module, x.detach().clone(), others)
    return without if len(without[0]) > len(calls) else (calls, to_the_end)


def _calls(module: nn.Module, leaf: Tensor, others: Collection[int]) -> tuple[list[Call], bool]:
    capture = _Capture(None, others, leaf)
    with isolated(module), capture, torch.enable_grad():
        for parameter in tree.parameters(module):
            if parameter.is_floating_point() and not parameter.is_inference():
                parameter.requires_grad_()
        try:
            _run(module, leaf)
        except Exception:
            if not capture.calls:
                raise
            return capture.calls, False
    return capture.calls, True


def convolution_call(
    module: nn.Module,
    stored: Tensor,
    x: Tensor,
    others: Collection[int] = (),
    *,
    index: int = 0,
    fed: bool = False,
    probe: Tensor | None = None,
    redraw: bool = False,
) -> Call:
    """What a module's forward pass, in evaluation mode, gives to a convolution.

    Args:
        module: Module that calls a convolution.
        stored: Weight that it holds; the one that is given has that shape.
        x: Input of the pass.
        others: Addresses of weights that do not count.
        index: Position among the calls with a weight of that shape.
        fed: Whether only those count whose input is computed from x.
        probe: Values to be tried in the parameter's place.
        redraw: Whether random numbers are others than without it.

    Returns:
        The call; its weight is differentiable by the module's parameters.

    Raises:
        NoConvolutionError: If there is none.
        Exception: Whatever the module's own code raises.
    """
    with _recording(module):
        leaf = _leaf(module, x) if fed else x.detach().clone()  # whose gradient code might refuse
        capture = _Capture(stored.shape, others, leaf, last=index, fed=fed)
        with isolated(module), capture, torch.enable_grad(), contextlib.suppress(_CapturedError):
            if probe is not None:
                stored.data.copy_(probe)
            if redraw:
                draw_numbers(stored.device)
            _run(module, leaf)
    if len(capture.calls) <= index:  # also where the module's code swallowed what ends the pass
        raise NoConvolutionError(NO_CALL)
    return capture.calls[index]


def _run(module: nn.Module, leaf: Tensor) -> None:
    try:
        module(leaf.clone())
    except SystemExit as error:  # of code that wants another input
        raise RuntimeError("its own code ended the program") from error


def _recording(module: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Context in which derivatives can be had, also in inference mode, unless the module was made there."""
    return torch.inference_mode(False) if _is_differentiable(module) else contextlib.nullcontext()


def _is_differentiable(module: nn.Module) -> bool:
    return not any(one.is_inference() for one in (*tree.parameters(module), *tree.buffers(module)))


def _leaf(module: nn.Module, x: Tensor) -> Tensor:
    """The input, such that derivatives tell what is computed from it; what inference mode made has none."""
    return x.detach().clone().requires_grad_(x.is_floating_point() and _is_differentiable(module))


def leaves(tensor: Tensor) -> set[int]:
    """The leaves that a tensor is computed from, by their ids; for the copies of a trial those of the originals."""
    nodes: dict[Any, None] = {tensor.grad_fn: None}
    pending = list(nodes)
    for node in pending:
        following = [one for one, _ in getattr(node, "next_functions", ()) if one not in nodes]
        nodes.update(dict.fromkeys(following))
        pending += following
    variables = [node.variable for node in nodes if hasattr(node, "variable")]
    return {getattr(one, ORIGINAL, id(one)) for one in variables}


def is_parameter(weight: Tensor) -> bool:
    """Whether the weight of a call is a parameter as it stands."""
    ((before, _),) = weight.grad_fn.next_functions if weight.grad_fn else ((None, 0),)
    parameter = getattr(before, "variable", None)
    return parameter is not None and torch.equal(parameter, weight)


class _CapturedError(BaseException):
    """Ends a forward pass where it gives a weight to a convolution; no handler of exceptions stops it."""


class _Capture(TorchFunctionMode):
    """Context that keeps what is given to convolutions with a weight of some shape.

    Args:
        shape: Shape of the weight; None for any.
        others: Addresses of weights that do not count.
        leaf: What the input of the pass is computed from.
        last: Position of the call that ends the forward pass. Default: None; it goes on.
        fed: Whether only calls count whose input is computed from it.
    """

    def __init__(
        self,
        shape: Sequence[int] | None,
        others: Collection[int],
        leaf: Tensor,
        *,
        last: int | None = None,
        fed: bool = False,
    ) -> None:
        super().__init__()
        self._shape, self._others, self._leaf, self._last, self._fed = shape, others, leaf, last, fed
        self.calls: list[Call] = []
        self._known: dict[Any, bool] = {None: False}  # whether a node of derivatives leads to the leaf

    def _is_fed(self, start: Any) -> bool:
        """Whether a node of derivatives leads to the leaf; what is known of others is not looked at again."""
        pending, seen, found = [start], set[Any](), False
        while pending and not found:
            node = pending.pop()
            if node in self._known:
                found = self._known[node]
            elif node not in seen:
                seen.add(node)
                found = getattr(node, "variable", None) is self._leaf
                pending += [following for following, _ in node.next_functions]
        self._known |= {start: True} if found else dict.fromkeys(seen, False)
        return found

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func in CONVOLUTIONS and (self._last is None or len(self.calls) <= self._last):
            given = convolution_arguments(func, args, kwargs)
            x, weight = given.x, given.weight
            if isinstance(weight, tuple):  # what stands for a quantized one has its scale and more beside it
                weight = next((one for one in weight if isinstance(one, Tensor)), torch.empty(()))
            if self._shape in (None, weight.shape) and weight.data_ptr() not in self._others:
                fed = isinstance(x, Tensor) and self._is_fed(x.grad_fn)
                if fed or not self._fed:
                    steps = math.prod(given.strides) ** (1 if len(given.strides) > 1 else weight.dim() - 2)
                    copy = weight.clone()  # before its memory is put back
                    self.calls.append(Call(copy, given.groups, given.transposed, steps, fed))
                if len(self.calls) - 1 == self._last:
                    raise _CapturedError
        return func(*args, **kwargs)
