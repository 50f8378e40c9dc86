"""The functions of PyTorch that convolve, their arguments and outputs, and the modules that may call them otherwise."""

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
    """The functions of these names, and the operators of ``torch.ops`` that code may call instead."""
    operators = [getattr(torch.ops.aten, name) for name in names]
    overloads = (getattr(operator, overload) for operator in operators for overload in operator.overloads())
    return {*(getattr(torch, name) for name in names), *operators, *overloads}


EITHER = _called("convolution", "_convolution")  # an argument says whether they are transposed
TRANSPOSED = _called("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
CONVOLUTIONS = _called("conv1d", "conv2d", "conv3d") | TRANSPOSED | EITHER
PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
METHODS = ("__call__", "forward", "_conv_forward")

Change = Callable[[str, Tensor, Tensor | None], Tensor | None]


def has_forward_of_its_own(module: _ConvNd) -> bool:
    """Whether the class of a convolution, or the module itself, replaces methods that decide which weight is used."""
    base = next((kind for kind in PLAIN if isinstance(module, kind)), None)
    # A method that is set on the module itself, as by a patch, takes precedence over that of its class.
    return base is None or any(
        name in vars(module) or getattr(type(module), name, None) is not getattr(base, name, None) for name in METHODS
    )


def per_axis(module: _ConvNd, name: str) -> tuple[int, ...]:
    """An attribute of a convolution for each axis of its kernel: a single number, as code may set, counts for all."""
    value = getattr(module, name)
    if isinstance(value, int):
        axes = next((position % 3 + 1 for position, kind in enumerate(PLAIN) if isinstance(module, kind)), 1)
        return (value,) * axes
    return tuple(value)


class Convolution(NamedTuple):
    """The arguments of a call of a function that convolves."""

    x: Any
    weight: Any
    bias: Tensor | None
    strides: Sequence[int]
    transposed: bool
    groups: int


def convolution_arguments(func: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Convolution:
    """The arguments of a convolution by name, from the call of any of `CONVOLUTIONS`."""

    def argument(name: str, position: int, default: Any = None) -> Any:
        return args[position] if len(args) > position else kwargs.get(name, default)

    x, weight, bias, stride = argument("input", 0), argument("weight", 1), argument("bias", 2), argument("stride", 3, 1)
    strides = (stride,) if isinstance(stride, int) else stride
    if func in EITHER:
        return Convolution(x, weight, bias, strides, argument("transposed", 6), argument("groups", 8))
    return Convolution(x, weight, bias, strides, func in TRANSPOSED, argument("groups", 6, 1))


@contextmanager
def convolution_outputs(modules: Sequence[tuple[str, _ConvNd]], change: Change) -> Iterator[None]:
    """Context in which the outputs of convolutions can be changed.

    `change` takes a convolution's name, its output and the bias in it, and returns the new output, or None to keep it.
    If the class of a module calls a convolution and then normalizes, activates or adds its bias, the output of that
    call counts; if no call is seen, the output of the module.
    """
    own, calls = {module for _, module in modules if has_forward_of_its_own(module)}, _Calls(change)
    with ExitStack() as stack:
        for name, module in modules:
            if module in own:
                stack.callback(module.register_forward_pre_hook(partial(calls.enter, name)).remove)
            # The hook has to run after an error too, or later calls would count as calls of this module.
            hook = partial(calls.leave if module in own else calls.change_output, name)
            stack.callback(module.register_forward_hook(hook, always_call=module in own).remove)
        if own:
            stack.enter_context(calls)
        yield


class _Calls(TorchFunctionMode):
    """Context that sees the convolutions which some modules call in their forward passes."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self._change = change
        self._running: list[tuple[str, _ConvNd]] = []
        self._seen: list[bool] = []  # for each running module, whether it has called a convolution

    def enter(self, name: str, module: _ConvNd, inputs: object) -> None:
        """Note, as a hook before the forward pass, that a module runs."""
        self._running.append((name, module))
        self._seen.append(False)

    def leave(self, name: str, module: _ConvNd, inputs: object, output: object) -> Tensor | None:
        """Change, as a hook after the forward pass, the module's output if no call of a convolution was seen."""
        self._running.pop()
        return None if self._seen.pop() else self.change_output(name, module, inputs, output)

    def change_output(self, name: str, module: _ConvNd, inputs: object, output: object) -> Tensor | None:
        """Change, as a hook after the forward pass, the output of a module that returns what its convolution does."""
        return self._change(name, output, getattr(module, "bias", None)) if isinstance(output, Tensor) else None

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> object:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func not in CONVOLUTIONS or not self._running:
            return output
        # The innermost of the running modules is the one that calls.
        name, module = self._running[-1]
        given = convolution_arguments(func, args, kwargs)
        stored = module._parameters.get("weight")  # the attribute might have to be computed
        others = (*vars(module).values(), *(buffer for key, buffer in module._buffers.items() if key != "weight"))
        other_shape = stored is not None and given.weight.shape != stored.shape
        if other_shape or any(given.weight is other for other in others):
            return output  # an auxiliary convolution, such as one that counts the inputs a mask covers
        self._seen[-1] = True
        changed = self._change(name, output, given.bias)
        return output if changed is None else changed
