"""Convolutional Similarity for training: with its gradient in closed form, taken on the way, in few operations.

Letters: G groups, M filters of a group, C input channels of a group, T taps, N lattice points, F frequencies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from convsim_init.settings import Channels, Pairs
from convsim_init.similarity import (
    bank_weight,
    computing_bank,
    count_pairs,
    filter_norms,
    full_precision,
    nonzero,
    partner_power,
    per_filter,
    power_spectrum,
    real_fourier_basis,
)

VALUES_PER_BLOCK = 2**20  # of a spectrum: what stays in a core's cache


@dataclass(frozen=True)
class Layout:
    """How the weight of a convolution is to be read: its groups, and whether it is that of a transposed one."""

    groups: int = 1
    transposed: bool = False


def summed_similarity(
    weights: Sequence[Tensor], layouts: Sequence[Layout], pairs: Pairs, channels: Channels, *, normalized: bool
) -> Tensor:
    """Sum of `convolutional_similarity` over weights, on the device of the first; differentiable once.

    One node of the autograd graph for all of them: for small layers a node each costs more than the arithmetic.
    """
    total: Tensor = _Sum.apply(layouts, pairs, channels, normalized, *weights)  # type: ignore[no-untyped-call]
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layouts: Sequence[Layout], pairs: Pairs, channels: Channels, normalized: bool, *weights: Tensor
    ) -> Tensor:
        values, gradients = [], []
        for weight, layout in zip(weights, layouts, strict=True):
            with full_precision(weight.device):
                bank = computing_bank(weight, groups=layout.groups, transposed=layout.transposed, channels=channels)
                value, gradient = (_normalized if normalized else _raw)(bank, pairs, channels)
            values.append(value.to(weights[0].device))
            wide = bank_weight(gradient, groups=layout.groups, transposed=layout.transposed)
            gradients.append(wide.to(weight.dtype))
        ctx.save_for_backward(*gradients)
        return sum(values[1:], values[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [(outer.to(gradient.device) * gradient).to(gradient.dtype) for gradient in ctx.saved_tensors]
        return None, None, None, None, *gradients


def _normalized(bank: Tensor, pairs: Pairs, channels: Channels) -> tuple[Tensor, Tensor]:
    lengths = filter_norms(bank)  # [G, M]
    norms = per_filter(nonzero(lengths), bank).to(bank.dtype)
    unit = bank / norms
    value, gradient = _raw(unit, pairs, channels)
    scale = (1 / count_pairs(lengths > 0, pairs).clamp(min=1)).to(bank.dtype)
    along = (unit * gradient).flatten(2).sum(2)  # [G, M]
    return scale * value, gradient.sub_(per_filter(along, bank) * unit).mul_(scale / norms)


def _raw(bank: Tensor, pairs: Pairs, channels: Channels) -> tuple[Tensor, Tensor]:
    """With P the power of the spectrum X and Q that of the partners, CS = <P, Q> / 2 and dCS/dX = 2 Q X."""
    basis, twice_adjoint = _basis(bank.shape[3:], bank.dtype, bank.device)  # [N, T], [T, N]
    kernels = bank.flatten(3)  # [G, M, C, T]
    groups, filters, inputs, taps = kernels.shape
    points, frequencies = len(basis), len(basis) // 2 + 1
    step = inputs if channels == "all" else max(1, VALUES_PER_BLOCK // (points * groups * filters))
    values, gradients = [], []
    for some in torch.split(kernels, step, dim=2):
        spectrum = basis @ some.permute(3, 0, 2, 1).reshape(taps, -1)  # [N, G c M]
        spectrum = spectrum.view(points, groups, -1, filters)
        power = power_spectrum(spectrum, channels)  # [F, G, c, M]
        partners = partner_power(power, pairs)
        values.append(torch.dot(power.flatten(), partners.flatten()) / 2)
        spectrum[:frequencies] *= partners
        spectrum[frequencies:] *= partners[1:]
        gradient = twice_adjoint @ spectrum.view(points, -1)  # [T, G c M]
        gradients.append(gradient.view(taps, groups, -1, filters).permute(1, 3, 2, 0))  # [G, M, c, T]
    return sum(values[1:], values[0]), torch.cat(gradients, dim=2).view(bank.shape)


@lru_cache(maxsize=64)
def _basis(kernel_size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    basis = real_fourier_basis(kernel_size, dtype, device)
    return basis, (2 * basis.T).contiguous()
