"""The functions of PyTorch that convolve, what they are given, and the modules that call them as they stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

TRANSPOSED = {F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d, torch.convolution, *TRANSPOSED}
PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
METHODS = ("__call__", "forward", "_conv_forward")


def has_forward_of_its_own(module: _ConvNd) -> bool:
    """Whether its class, or the module itself, may use another weight than PyTorch's convolutions do."""
    base = next((kind for kind in PLAIN if isinstance(module, kind)), None)
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
    if func is torch.convolution:
        return Convolution(x, weight, bias, strides, argument("transposed", 6), argument("groups", 8))
    return Convolution(x, weight, bias, strides, func in TRANSPOSED, argument("groups", 6, 1))
