"""Convolutional Similarity for training: with its gradient in closed form, taken on the way, in few operations.

Letters: G groups, M filters of a group, C input channels of a group, T taps, N lattice points, F frequencies.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from convsim_init.settings import Channels, Pairs
from convsim_init.similarity import (
    count_pairs,
    filter_norms,
    nonzero,
    partner_power,
    power_spectrum,
    real_fourier_basis,
)

VALUES_PER_BLOCK = 2**20  # of a spectrum: what stays in a core's cache


def quick_similarity(bank: Tensor, pairs: Pairs, channels: Channels, *, normalized: bool) -> Tensor:
    """Convolutional Similarity of a bank ``[G, M, C, *kernel_size]``, float32 or float64; differentiable once."""
    similarity: Tensor = _Similarity.apply(bank, pairs, channels, normalized)  # type: ignore[no-untyped-call]
    return similarity


class _Similarity(torch.autograd.Function):
    """With P the power of the spectrum X and Q that of the partners, CS = <P, Q> / 2 and dCS/dX = 2 Q X."""

    @staticmethod
    def forward(ctx: Any, bank: Tensor, pairs: Pairs, channels: Channels, normalized: bool) -> Tensor:
        kernels = bank.flatten(3)  # [G, M, C, T]
        if not normalized:
            value, gradient = _value_and_gradient(kernels, bank.shape[3:], pairs, channels)
        else:
            lengths = filter_norms(bank)[..., None, None]  # [G, M, 1, 1]
            norms = nonzero(lengths).to(bank.dtype)
            unit = kernels / norms
            value, gradient = _value_and_gradient(unit, bank.shape[3:], pairs, channels)
            scale = 1 / count_pairs(lengths[..., 0, 0] > 0, pairs).clamp(min=1)
            along = (unit * gradient).sum((2, 3), keepdim=True)
            value, gradient = scale * value, (gradient - along * unit) * (scale / norms)
        ctx.save_for_backward(gradient.view(bank.shape))
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return outer * gradient, None, None, None


def _value_and_gradient(
    kernels: Tensor, kernel_size: tuple[int, ...], pairs: Pairs, channels: Channels
) -> tuple[Tensor, Tensor]:
    """Raw similarity of kernels ``[G, M, C, T]``, and its gradient of that shape."""
    basis, twice_adjoint = _basis(kernel_size, kernels.dtype, kernels.device)  # [N, T], [T, N]
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
    if len(values) == 1:
        return values[0], gradients[0].contiguous()
    return torch.stack(values).sum(), torch.cat(gradients, dim=2).contiguous()


@lru_cache(maxsize=64)
def _basis(kernel_size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    basis = real_fourier_basis(kernel_size, dtype, device)
    return basis, (2 * basis.T).contiguous()
