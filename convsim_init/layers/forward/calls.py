"""The functions of PyTorch that convolve, what they are given, what they give, and who calls them as they stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode


def _called(*names: str) -> set[Callable[..., Any]]:
    """The functions of those names, as of `torch.nn.functional`, and the operators that code may call instead."""
    operators = [getattr(torch.ops.aten, name) for name in names]
    overloads = (getattr(one, overload) for one in operators for overload in one.overloads())
    return {*(getattr(torch, name) for name in names), *operators, *overloads}


EITHER = _called("convolution", "_convolution")  # transposed or not, as an argument says
TRANSPOSED = _called("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
CONVOLUTIONS = _called("conv1d", "conv2d", "conv3d") | TRANSPOSED | EITHER
PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
METHODS = ("__call__", "forward", "_conv_forward")

Change = Callable[[str, Tensor, Tensor | None], Tensor | None]


def has_forward_of_its_own(module: _ConvNd) -> bool:
    """Whether its class, or the module itself, may use another weight than PyTorch's convolutions do."""
    base = next((kind for kind in PLAIN if isinstance(module, kind)), None)
    # A `forward` that is set on the module itself, as by a patch, goes before its class's.
    return base is None or any(
        name in vars(module) or getattr(type(module), name, None) is not getattr(base, name, None) for name in METHODS
    )


class Convolution(NamedTuple):
    """What a function that convolves is given."""

    x: Any
    weight: Any
    bias: Tensor | None
    strides: Sequence[int]
    transposed: bool
    groups: int


def convolution_arguments(func: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Convolution:
    """The arguments of a convolution, by whichever function."""

    def argument(name: str, position: int, default: Any = None) -> Any:
        return args[position] if len(args) > position else kwargs.get(name, default)

    x, weight, bias, stride = argument("input", 0), argument("weight", 1), argument("bias", 2), argument("stride", 3, 1)
    strides = (stride,) if isinstance(stride, int) else stride
    if func in EITHER:
        return Convolution(x, weight, bias, strides, argument("transposed", 6), argument("groups", 8))
    return Convolution(x, weight, bias, strides, func in TRANSPOSED, argument("groups", 6, 1))


@contextmanager
def convolution_outputs(modules: Sequence[tuple[str, _ConvNd]], change: Change) -> Iterator[None]:
    """Context in which a function is called with each output of convolutions, and may return another one.

    Where a class calls a convolution and then normalizes or activates what comes out, or adds its bias, it is what
    comes out; where no call is seen, it is what the module returns. The function is given the name of the convolution,
    the output and the bias that is in it; None leaves the output as it is.
    """
    own, calls = {module for _, module in modules if has_forward_of_its_own(module)}, _Calls(change)
    with ExitStack() as stack:
        for name, module in modules:
            if module in own:
                stack.callback(module.register_forward_pre_hook(partial(calls.enter, name)).remove)
            # Also after an error that others handle: else later calls would count as its own.
            hook = partial(calls.leave if module in own else calls.change_output, name)
            stack.callback(module.register_forward_hook(hook, always_call=module in own).remove)
        if own:
            stack.enter_context(calls)
        yield


class _Calls(TorchFunctionMode):
    """Context in which the convolutions that some modules call are seen."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self._change = change
        self._running: list[tuple[str, _ConvNd]] = []
        self._seen: list[bool] = []  # whether those that run have called a convolution

    def enter(self, name: str, module: _ConvNd, inputs: object) -> None:
        """Hook before the forward pass of such a module."""
        self._running.append((name, module))
        self._seen.append(False)

    def leave(self, name: str, module: _ConvNd, inputs: object, output: object) -> Tensor | None:
        """Hook after it."""
        self._running.pop()
        return None if self._seen.pop() else self.change_output(name, module, inputs, output)

    def change_output(self, name: str, module: _ConvNd, inputs: object, output: object) -> Tensor | None:
        """Hook after the forward pass of a module that returns what its convolution gives."""
        return self._change(name, output, getattr(module, "bias", None)) if isinstance(output, Tensor) else None

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> object:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func not in CONVOLUTIONS or not self._running:
            return output
        # A module within another is the one that calls, however many run around it.
        name, module = self._running[-1]
        _, weight, bias, *_ = convolution_arguments(func, args, kwargs)
        stored = module._parameters.get("weight")  # what is computed is not computed for this
        others = (*vars(module).values(), *(one for key, one in module._buffers.items() if key != "weight"))
        if (stored is not None and weight.shape != stored.shape) or any(weight is one for one in others):
            return output  # such as one that counts what a mask covers
        self._seen[-1] = True
        changed = self._change(name, output, bias)
        return output if changed is None else changed
