"""What convolutions are given, seen and measured from outside: no code of the product's is used."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

PRECISE = 2**16  # weights: larger ones are transformed in float32, and summed in float64


@dataclass(frozen=True)
class Seen:
    """The weight that a module gave to a convolution.

    Attributes:
        dtype: Its dtype.
        norms: Norms of its filters, ``[G, M]``.
        similarity: Mean similarity of two filters of norm 1: of a group and by its channels, as ``"matched"``; of all
            filters, each channel of one with each of the other's, as ``"all"``.
    """

    dtype: torch.dtype
    norms: Tensor
    similarity: dict[str, float]


class Watch(TorchDispatchMode):
    """Context that measures, for each module that runs in it, the first weight that it gives to a convolution.

    Whatever a forward pass calls ends in this one operator: `torch.nn.functional.conv*`, `torch.conv*`, code of
    TorchScript.

    Attributes:
        seen: By the name of the module.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Seen] = {}
        self._running: list[str] = []
        self._stored: dict[int, str] = {}

    @contextmanager
    def over(self, model: nn.Module, names: Collection[str]) -> Iterator[None]:
        """Context that watches the modules of these names."""
        hooks = []
        for name in names:
            module = model.get_submodule(name)
            self._stored |= {parameter.data_ptr(): name for parameter in module.parameters(recurse=False)}
            if not isinstance(module, torch.jit.ScriptModule):  # which takes no hook
                hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self._running.append(name)))
                hooks.append(module.register_forward_hook(self._leave))
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _leave(self, *_) -> None:
        self._running.pop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            _, weight, *_, transposed, _, groups = args
            # No hook is called in TorchScript, nor where another module uses the weight.
            name = self._running[-1] if self._running else self._stored.get(weight.data_ptr())
            if name is not None and name not in self.seen:
                self.seen[name] = look_at(weight.detach(), groups=groups, transposed=transposed)
        return func(*args, **(kwargs or {}))


def look_at(weight: Tensor, *, groups: int = 1, transposed: bool = False) -> Seen:
    """Norms and similarity of filters: the mean energy of the cross-correlation of two, by a Fourier transform."""
    precise = weight.to(torch.float64 if weight.numel() <= PRECISE else torch.float32)
    bank = precise.unflatten(0, (groups, -1))  # [G, M, C, *kernel_size]; transposed, [G, C, M, *kernel_size]
    bank = (bank.transpose(1, 2) if transposed else bank).flatten(3)  # [G, M, C, T]
    norms = torch.linalg.vector_norm(bank, dim=(2, 3), dtype=torch.float64)  # [G, M]
    unit = bank / norms.where(norms > 0, 1)[..., None, None].to(bank)
    real, imaginary = fourier_matrices(weight.shape[2:], bank.dtype)
    power = (unit @ real).square_().add_((unit @ imaginary).square_())  # [G, M, C, N]
    whole = power.sum(2, dtype=torch.float64).flatten(0, 1)[None, :, None]  # [1, G M, 1, N]
    points = real.shape[1]
    similarity = {
        "matched": mean_overlap(power, norms > 0) / points,
        "all": mean_overlap(whole, (norms > 0).flatten()[None]) / points,
    }
    return Seen(weight.dtype, norms, similarity)


def mean_overlap(power: Tensor, alive: Tensor) -> float:
    """Mean over pairs of distinct filters of a group of the product of their spectra; filters of zeros form none."""
    # The sum over pairs of distinct filters is that over all pairs less that of each filter with itself.
    together = power.sum(1, dtype=torch.float64).square().sum()
    alone = power.square().sum(dtype=torch.float64)
    filters = alive.sum(1)
    return float(together - alone) / max(int((filters * (filters - 1)).sum()), 1)


def fourier_matrices(kernel_size: Collection[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[T, N]`` of the transform of T taps on N points, enough for shifts not to meet around."""
    phase = torch.zeros(1, 1, dtype=torch.float64)
    for taps in kernel_size:
        points = 2 * taps - 1
        places = torch.arange(points, dtype=torch.float64)
        one = torch.outer(places[:taps], places) * (2 * math.pi / points)  # [taps, points]
        phase = (phase[:, None, :, None] + one[None, :, None, :]).flatten(2).flatten(0, 1)
    return phase.cos().to(dtype), phase.sin().to(dtype)
