"""Convolutional Similarity for training: with its gradient in closed form, taken on the way, in few operations.

Letters: G groups, M filters of a group, C input channels of a group, T taps, K kernels of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from convsim_init.backends.compiled import CompiledSimilarity, fits, library
from convsim_init.backends.packs import VALUES_PER_PACK, Pack
from convsim_init.functional.similarity import accumulation_dtype, bank_weight, filter_bank, full_precision
from convsim_init.settings import Channels, Pairs


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
        looks = tuple(_Look(w.shape, w.dtype, w.device, layout) for w, layout in zip(weights, layouts, strict=True))
        # What only stands for a tensor has no memory that C code could read.
        real = all(type(weight).__torch_dispatch__ is Tensor.__torch_dispatch__ for weight in weights)
        real = real and not torch.compiler.is_compiling()
        similarities = _similarities(looks, pairs, channels, real and library() is not None)
        ctx.looks, ctx.weights, ctx.plan = looks, weights, None  # the weights may change until `backward`
        total, gradients = _by_layer(similarities, looks, weights, normalized)
        if total is None:
            ctx.plan = _plan(looks, pairs, channels)
            total, gradients = _by_pack(ctx.plan, looks, weights, normalized)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            if ctx.plan is None:
                alone = zip(ctx.looks, ctx.saved_tensors, strict=True)
                gradients = [look.weight(outer * gradient) for look, gradient in alone]
            else:
                gradients = _unpacked(ctx.plan, ctx.looks, outer, ctx.saved_tensors)
        if torch.is_grad_enabled():  # a second derivative may follow
            gradients = list(map(_Once.apply, gradients, ctx.weights))
        return None, None, None, None, *gradients


class _Once(torch.autograd.Function):
    """A gradient that knows what it depends on, and refuses to say how: silently it would count as constant."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, weight: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "ConvolutionalSimilarity is differentiable once: for second derivatives take convolutional_similarity"
        )


class _Look(NamedTuple):
    """All that has to be known of a weight beforehand."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    layout: Layout

    def bank(self, channels: Channels) -> torch.Size:
        """Shape ``[G, M, C, *kernel_size]`` of its filter bank."""
        empty = torch.empty(self.shape, dtype=self.dtype, device="meta")
        return filter_bank(empty, **self.layout._asdict(), channels=channels).shape

    def kernels(self, weight: Tensor) -> Tensor:
        """Its kernels ``[K, T]``, in the order of its filters."""
        if self.layout.transposed:
            weight = filter_bank(weight, groups=self.layout.groups, transposed=True)
        return weight.reshape(-1, self.shape[2:].numel())

    def weight(self, kernels: Tensor) -> Tensor:
        """The weight that has these kernels."""
        if self.layout.transposed:
            return bank_weight(kernels.view(self.bank("matched")), groups=self.layout.groups, transposed=True)
        return kernels.view(self.shape)


_Plan: TypeAlias = list[tuple[Pack, list[int]]]  # packs, and which of all weights are in them


def _by_layer(
    similarities: Sequence[CompiledSimilarity], looks: Sequence[_Look], weights: Sequence[Tensor], normalized: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """The sum, None where it cannot be compiled; and the gradients ``[K, T]``."""
    if not similarities:
        return None, []
    kernels = [look.kernels(weight).resolve_neg().contiguous() for look, weight in zip(looks, weights, strict=True)]
    gradients = [torch.empty_like(some) for some in kernels]
    alone = zip(similarities, kernels, gradients, strict=True)
    values = [similarity(some, out, normalized=normalized) for similarity, some, out in alone]
    return None if min(values) == -1 else kernels[0].new_tensor(sum(values)), gradients


def _by_pack(
    plan: _Plan, looks: Sequence[_Look], weights: Sequence[Tensor], normalized: bool
) -> tuple[Tensor, list[Tensor]]:
    """The sum; and the gradients of each pack's kernels ``[K, T]``."""
    values, gradients = [], []
    for pack, members in plan:
        with full_precision(pack.device):
            kernels = torch.cat([looks[member].kernels(weights[member]) for member in members])
            value, gradient = (pack.normalized if normalized else pack.raw)(kernels.to(pack.dtype))
        values.append(value.to(weights[0].device))
        gradients.append(gradient)
    return sum(values[1:], values[0]), gradients


def _unpacked(plan: _Plan, looks: Sequence[_Look], outer: Tensor, packed: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the weights, in their order."""
    gradients: dict[int, Tensor] = {}
    for (pack, members), gradient in zip(plan, packed, strict=True):
        scaled = (outer.to(pack.device) * gradient).to(looks[members[0]].dtype)
        for member, part in zip(members, torch.split(scaled, pack.kernels), strict=True):
            gradients[member] = looks[member].weight(part)
    return [gradients[position] for position in range(len(gradients))]


@lru_cache(maxsize=64)
def _similarities(
    looks: tuple[_Look, ...], pairs: Pairs, channels: Channels, compiled: bool
) -> Sequence[CompiledSimilarity]:
    """One for each weight, or none where C code cannot do all."""
    if compiled and all(fits(look.dtype, look.device, pairs, channels) for look in looks):
        return [CompiledSimilarity(look.bank(channels)) for look in looks]
    return []


@lru_cache(maxsize=64)
def _plan(looks: tuple[_Look, ...], pairs: Pairs, channels: Channels) -> _Plan:
    """Small weights of one kernel size, dtype and device go together."""
    alike: dict[Any, list[list[int]]] = {}
    room: dict[Any, int] = {}
    for position, look in enumerate(looks):
        bank = look.bank(channels)
        values = bank[:3].numel() * math.prod(2 * size - 1 for size in bank[3:])  # of its spectrum
        key = (bank[3:], look.dtype, look.device)
        room[key] = room.get(key, 0) - values
        if room[key] < 0:
            alike.setdefault(key, []).append([])
            room[key] = VALUES_PER_PACK - values
        alike[key][-1].append(position)
    return [
        (_pack([looks[member] for member in members], pairs, channels), members)
        for packs in alike.values()
        for members in packs
    ]


def _pack(looks: Sequence[_Look], pairs: Pairs, channels: Channels) -> Pack:
    banks = [look.bank(channels) for look in looks]
    return Pack(banks, pairs, channels, accumulation_dtype(looks[0].dtype), looks[0].device)
