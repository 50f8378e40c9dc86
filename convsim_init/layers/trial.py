"""A trial pass: a module's forward pass is begun, and the weight is taken that it gives to a convolution.

Whatever the pass changes, in place or by assignment, is put back: parameters, buffers, attributes,
modes and random states are those of before, to the bit.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

CONVOLUTIONS = {
    *(F.conv1d, F.conv2d, F.conv3d, torch.convolution),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
}
LATER_HOOKS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")  # a trial ends before they are due


class NoConvolutionError(RuntimeError):
    """The forward pass called no convolution with a weight of the module's shape."""


def weight_given_to_convolution(
    module: _ConvNd, shape: Sequence[int], like: Tensor, *, probe: Tensor | None = None
) -> Tensor:
    """The first weight of that shape that the module's forward pass gives to a convolution.

    The module runs in evaluation mode on zeros of the dtype and device of ``like``; with ``probe`` in
    place of its parameter's values.

    Returns:
        The weight at that moment, differentiable by the module's parameters; it shares no memory with
        them.

    Raises:
        NoConvolutionError: If there is none.
        Exception: Whatever the module's own code raises.
    """
    size = [dilation * (taps - 1) + 1 for dilation, taps in zip(module.dilation, module.kernel_size, strict=True)]
    try:
        with isolated(module), _Capture(shape):
            if probe is not None:
                module.weight.data.copy_(probe)
            module(torch.zeros(1, module.in_channels, *size, dtype=like.dtype, device=like.device))
    except _CapturedError as captured:
        return captured.weight
    raise NoConvolutionError("its forward pass called no convolution with a weight of that shape")


@contextmanager
def isolated(module: nn.Module) -> Iterator[None]:
    """Context in which a module can run in evaluation mode and nothing of what that changes remains.

    Its tensors stay the same objects, which hooks and closures may know, but point to copies of
    their data; its attributes are copies. Both are put back at the end.
    """
    parts = list(module.modules())
    attributes = [dict(vars(part)) for part in parts]
    tensors = {id(tensor): tensor for part in parts for tensor in _tensors(part)}
    data = [(tensor, tensor.data) for tensor in tensors.values() if not tensor.is_inference()]
    with _random_states(tensors.values()):
        try:
            for tensor, values in data:
                tensor.data = values.clone()
            memo: dict[int, Any] = {id(part): part for part in parts}
            memo |= {key: tensor.clone() if tensor.is_inference() else tensor for key, tensor in tensors.items()}
            for part in parts:
                vars(part).update({name: _copied(value, memo) for name, value in vars(part).items()})
                vars(part)["training"] = False
                vars(part).update({name: type(vars(part)[name])() for name in LATER_HOOKS if name in vars(part)})
            yield
        finally:
            for part, before in zip(parts, attributes, strict=True):
                vars(part).clear()
                vars(part).update(before)
            for tensor, values in data:
                tensor.data = values


def _tensors(part: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and tensors that are plain attributes of a module itself."""
    for value in (*part._parameters.values(), *part._buffers.values(), *vars(part).values()):
        if isinstance(value, Tensor):
            yield value


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of an attribute, but for the modules and tensors in the memo; itself where it cannot be copied."""
    if isinstance(value, torch.Generator):
        return value.clone_state()
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # of any kind: a lock, an open file, a tensor that was computed
        return copy.copy(value) if isinstance(value, (dict, list, set)) else value


@contextmanager
def _random_states(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Context that leaves the random states of torch, Python and NumPy as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    cards = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    with torch.random.fork_rng(cards):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


class _CapturedError(BaseException):
    """Ends a forward pass where it gives a weight to a convolution; no handler of exceptions stops it."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight


class _Capture(TorchFunctionMode):
    """Context in which the first convolution with a weight of that shape raises it."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self._shape = list(shape)

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func in CONVOLUTIONS:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if list(weight.shape) == self._shape:
                raise _CapturedError(weight.clone())  # before its memory is put back
        return func(*args, **kwargs)
