"""Convolutional Similarity for training: with its gradient in closed form, taken on the way, in few operations.

Letters: G groups, M filters of a group, C input channels of a group, T taps, K kernels of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from convsim_init.compiled import library
from convsim_init.packs import VALUES_PER_PACK, Pack
from convsim_init.settings import Channels, Pairs
from convsim_init.similarity import accumulation_dtype, bank_weight, filter_bank, full_precision


class Layout(NamedTuple):
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
        looks = [_Look(w.shape, w.dtype, w.device, layout) for w, layout in zip(weights, layouts, strict=True)]
        ctx.plan = _plan(tuple(looks), pairs, channels, library() is not None)
        values, gradients = [], []
        for pack, members in ctx.plan:
            with full_precision(pack.device):
                kernels = torch.cat([member.kernels(weights[member.position]) for member in members]).to(pack.dtype)
                value, gradient = pack.normalized(kernels) if normalized else pack.raw(kernels)
            values.append(value.to(weights[0].device))
            gradients.append(gradient)
        ctx.save_for_backward(*gradients)
        total: Tensor = sum(values[1:], values[0])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        gradients: dict[int, Tensor] = {}
        for (pack, members), gradient in zip(ctx.plan, ctx.saved_tensors, strict=True):
            scaled = (outer.to(pack.device) * gradient).to(members[0].look.dtype)
            for member, part in zip(members, torch.split(scaled, pack.kernels), strict=True):
                gradients[member.position] = member.weight(part)
        return None, None, None, None, *(gradients[position] for position in range(len(gradients)))


class _Look(NamedTuple):
    """All that has to be known of a weight beforehand."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    layout: Layout


class _Member(NamedTuple):
    """A weight in a pack: which one of all, and the shape of its filter bank."""

    position: int
    look: _Look
    bank: torch.Size

    def kernels(self, weight: Tensor) -> Tensor:
        """Its kernels ``[K, T]``, in the order of its filters."""
        if self.look.layout.transposed:
            weight = filter_bank(weight, groups=self.look.layout.groups, transposed=True)
        return weight.reshape(-1, self.bank[3:].numel())

    def weight(self, kernels: Tensor) -> Tensor:
        """The weight that has these kernels."""
        if self.look.layout.transposed:
            return bank_weight(kernels.view(self.bank), groups=self.look.layout.groups, transposed=True)
        return kernels.view(self.look.shape)


@lru_cache(maxsize=64)
def _plan(
    looks: tuple[_Look, ...], pairs: Pairs, channels: Channels, compiled: bool
) -> list[tuple[Pack, list[_Member]]]:
    """Small weights of one kernel size, dtype and device go together; another plan where ``compiled`` changes."""
    alike: dict[Any, list[list[_Member]]] = {}
    room: dict[Any, int] = {}
    for position, look in enumerate(looks):
        empty = torch.empty(look.shape, dtype=look.dtype, device="meta")
        bank = filter_bank(empty, groups=look.layout.groups, transposed=look.layout.transposed, channels=channels).shape
        values = bank[:3].numel() * math.prod(2 * size - 1 for size in bank[3:])  # of its spectrum
        key = (bank[3:], look.dtype, look.device)
        room[key] = room.get(key, 0) - values
        if room[key] < 0:
            alike.setdefault(key, []).append([])
            room[key] = VALUES_PER_PACK - values
        alike[key][-1].append(_Member(position, look, bank))
    return [
        (Pack([member.bank for member in members], pairs, channels, accumulation_dtype(dtype), device), members)
        for (_, dtype, device), packs in alike.items()
        for members in packs
    ]
