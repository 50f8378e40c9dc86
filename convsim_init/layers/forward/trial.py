"""A trial pass: a module's forward pass is begun, and the weight is taken that it gives to a convolution."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from convsim_init.layers.forward.code import CONVOLUTIONS, TRANSPOSED
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
    """

    weight: Tensor
    groups: int
    transposed: bool


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
    capture = _Capture(None, others)
    with isolated(module), capture, torch.enable_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point() and not parameter.is_inference():
                parameter.requires_grad_()
        try:
            module(x)
        except Exception:
            if not capture.calls:
                raise
            return capture.calls, False
    return capture.calls, True


def weight_given_to_convolution(
    module: nn.Module,
    stored: Tensor,
    x: Tensor,
    others: Collection[int] = (),
    *,
    index: int = 0,
    probe: Tensor | None = None,
    redraw: bool = False,
) -> Tensor:
    """The weight that a module's forward pass, in evaluation mode, gives to a convolution.

    Args:
        module: Module that calls a convolution.
        stored: Weight that it holds; the one that is given has that shape.
        x: Input of the pass.
        others: Addresses of weights that do not count.
        index: Position among the calls with a weight of that shape.
        probe: Values to be tried in the parameter's place.
        redraw: Whether random numbers are others than without it.

    Returns:
        The weight at that moment, differentiable by the module's parameters; it shares no memory with
        them.

    Raises:
        NoConvolutionError: If there is none.
        Exception: Whatever the module's own code raises.
    """
    capture = _Capture(stored.shape, others, last=index)
    with isolated(module), capture, contextlib.suppress(_CapturedError):
        if probe is not None:
            stored.data.copy_(probe)
        if redraw:
            draw_numbers(stored.device)
        module(x)
    if len(capture.calls) <= index:  # also where the module's code swallowed what ends the pass
        raise NoConvolutionError(NO_CALL)
    return capture.calls[index].weight


class _CapturedError(BaseException):
    """Ends a forward pass where it gives a weight to a convolution; no handler of exceptions stops it."""


class _Capture(TorchFunctionMode):
    """Context that keeps what is given to convolutions with a weight of some shape.

    Args:
        shape: Shape of the weight; None for any.
        others: Addresses of weights that do not count.
        last: Position of the call that ends the forward pass. Default: None; it goes on.
    """

    def __init__(self, shape: Sequence[int] | None, others: Collection[int], last: int | None = None) -> None:
        super().__init__()
        self._shape, self._others, self._last = shape, others, last
        self.calls: list[Call] = []

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func in CONVOLUTIONS and (self._last is None or len(self.calls) <= self._last):
            weight, _, transposed, groups = convolution_arguments(func, args, kwargs)
            if isinstance(weight, tuple):  # what stands for a quantized one has its scale and more beside it
                weight = next((one for one in weight if isinstance(one, Tensor)), torch.empty(()))
            if self._shape in (None, weight.shape) and weight.data_ptr() not in self._others:
                self.calls.append(Call(weight.clone(), groups, transposed))  # before its memory is put back
                if len(self.calls) - 1 == self._last:
                    raise _CapturedError
        return func(*args, **kwargs)


def convolution_arguments(
    func: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None, bool, int]:
    """The weight of a convolution, its bias, whether it is transposed, and its groups."""

    def argument(name: str, position: int, default: Any = None) -> Any:
        return args[position] if len(args) > position else kwargs.get(name, default)

    weight, bias = argument("weight", 1), argument("bias", 2)
    if func is torch.convolution:
        return weight, bias, argument("transposed", 6), argument("groups", 8)
    return weight, bias, func in TRANSPOSED, argument("groups", 6, 1)
