"""Convolutions whose class computes another weight from its parameter in every forward pass.

Weight standardization (arXiv 1903.10520) and its scaled form (arXiv 2101.08692) do: what the network uses are filters
of zero mean and fixed norm, ``used = slope * (weight - mean(weight))``. Other classes scale their filters. No class is
known here by its name: a forward pass is begun, and the weight is taken that it hands to the convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from convsim_init.layers.weights import Weight, backup_tensors, describe_mismatch, evaluating, to_float64

PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = {
    *(F.conv1d, F.conv2d, F.conv3d, torch.convolution),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
}
METHODS = ("forward", "_conv_forward")


def has_forward_of_its_own(module: _ConvNd) -> bool:
    """Whether its class, or the module itself, may use another weight than PyTorch's convolutions do."""
    base = next((kind for kind in PLAIN if isinstance(module, kind)), None)
    return base is None or any(
        name in vars(module) or getattr(type(module), name, None) is not getattr(base, name, None) for name in METHODS
    )


class ForwardWeight(Weight):
    """The weight that a forward pass of its own uses: the stored one, or that one's filters centred or scaled.

    Args:
        module: The convolution.
        stored: The weight that its attribute holds.
    """

    def __init__(self, module: _ConvNd, stored: Weight) -> None:
        super().__init__(*stored.sources)
        self._module, self._stored = module, stored
        self._centred = False

    @property
    def shape(self) -> list[int]:
        """Shape of the stored weight."""
        return self._stored.shape

    def obstacle(self, *, read_only: bool) -> str | None:
        """Why the stored weight cannot be had, or what its class does with it that is not known here."""
        obstacle = self._stored.obstacle(read_only=read_only)
        if obstacle is not None:
            return obstacle
        kind = type(self._module).__name__
        try:
            used, stored = self.read(), self._stored.read()
        except Exception as error:  # whatever the class's own code raises
            text = " ".join(str(error).split())
            return f"which weight {kind} uses is not known: a trial pass ended with {type(error).__name__}: {text}"
        if not used.any() and stored.any():
            return f"all weights are zero that {kind} makes of its parameter: its gain is zero"
        for self._centred in (False, True):
            if describe_mismatch("class", self._slopes(used, stored) * self._variable(stored), used) is None:
                return None
        return f"{kind} computes its weight from the parameter in a way that is not known here"

    def compute(self) -> Tensor:
        """The weight that a forward pass hands to the convolution."""
        module, stored = self._module, self._stored.read()
        size = [dilation * (taps - 1) + 1 for dilation, taps in zip(module.dilation, module.kernel_size, strict=True)]
        try:
            with evaluating(module), _Capture(stored.shape):
                module(stored.new_zeros(1, module.in_channels, *size))
        except _CapturedError as captured:
            return captured.weight
        raise RuntimeError("no convolution with a weight of that shape was called")

    @torch.no_grad()
    def write(self, weight: Tensor) -> str | None:
        """Choose the stored weight so that its class computes this one, centred if the class centres filters."""
        used, stored = self.read(), self._stored.read()
        if used.data_ptr() == stored.data_ptr():
            return self._stored.write(weight)
        slopes = self._slopes(used, stored)  # [M, 1, ...]
        target = self._variable(weight)
        target *= _ratios(_norms(weight), _norms(target))
        changed = to_float64(stored) - self._variable(stored) + target / torch.where(slopes == 0, 1, slopes)
        self._stored.write(torch.where(slopes == 0, stored, changed).to(weight))
        return describe_mismatch("class", target, self.read())

    def backup(self) -> Callable[[], None]:
        """What gives back the tensors that the stored weight is stored in."""
        restore, undo = backup_tensors(self.sources), self._stored.backup()

        def undo_both() -> None:
            restore()
            undo()

        return undo_both

    def storage(self) -> list[Tensor]:
        """The tensors that the stored weight is stored in."""
        return self._stored.storage()

    def _variable(self, weight: Tensor) -> Tensor:
        """What of a weight ``[M, ...]`` its class makes use of, in the widest dtype."""
        weight = to_float64(weight)
        return weight - weight.mean(tuple(range(1, weight.dim())), keepdim=True) if self._centred else weight.clone()

    def _slopes(self, used: Tensor, stored: Tensor) -> Tensor:
        """For each filter the factor from the stored weight to the one that is used, ``[M, 1, ...]``."""
        variable = self._variable(stored)
        axes = tuple(range(1, used.dim()))
        return _ratios((to_float64(used) * variable).sum(axes, keepdim=True), variable.square().sum(axes, keepdim=True))


def _norms(weight: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(to_float64(weight), dim=tuple(range(1, weight.dim())), keepdim=True)
    return norms


def _ratios(above: Tensor, below: Tensor) -> Tensor:
    return above / torch.where(below == 0, 1, below)


class _CapturedError(BaseException):
    """Ends a forward pass where it hands a weight to a convolution; no handler of exceptions stops it."""

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
                raise _CapturedError(weight)
        return func(*args, **kwargs)
