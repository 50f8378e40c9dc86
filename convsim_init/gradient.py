"""Convolutional Similarity for training: its gradient in closed form, taken on the way, one cached block at a time."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from convsim_init.fourier import Fourier, Halves
from convsim_init.settings import Channels, Pairs
from convsim_init.similarity import partner_power, power_spectrum


def quick_similarity(bank: Tensor, pairs: Pairs, channels: Channels) -> Tensor:
    """`bank_similarity`, several times as fast with its gradient, but differentiable once only."""
    similarity: Tensor = _Similarity.apply(bank, pairs, channels)  # type: ignore[no-untyped-call]
    return similarity


class _Similarity(torch.autograd.Function):
    """With P the power of the spectrum X and Q that of the partners, CS = <P, Q> / 2 and dCS/dX = 2 Q X."""

    @staticmethod
    def forward(ctx: Any, bank: Tensor, pairs: Pairs, channels: Channels) -> Tensor:
        fourier = _fourier(bank.shape[3:], bank.dtype, bank.device)
        value, gradients = bank.new_zeros(()), []
        whole = channels == "all" or bank.device.type != "cpu"
        for some_groups, some_channels, coordinates in fourier.blocks(bank, whole=whole):
            spectrum = Halves(coordinates.new_empty(fourier.points, *coordinates.shape[1:]))
            fourier.forward(Halves(coordinates), out=spectrum)
            power = power_spectrum(spectrum.whole, channels)  # [F, g, c, M]
            partners = partner_power(power, pairs)
            value += power.mul_(partners).sum() / 2
            if ctx.needs_input_grad[0]:
                spectrum.first.mul_(partners)
                spectrum.second.mul_(partners[1:])
                fourier.twice_adjoint(spectrum, out=Halves(coordinates))
                gradients.append((some_groups, some_channels, coordinates))
        if gradients:
            ctx.save_for_backward(fourier.bank(gradients, bank.shape))
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return outer * gradient, None, None


@lru_cache(maxsize=64)
def _fourier(kernel_size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Fourier:
    return Fourier(kernel_size, dtype, device)
