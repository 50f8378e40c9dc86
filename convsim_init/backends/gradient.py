"""Convolutional Similarity for training: the gradient in closed form, computed in the forward pass.

Letters: G groups, M filters of a group, C input channels of a group, T taps, K = G M C kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convsim_init.backends.compiled import CompiledSimilarity, fits
from convsim_init.backends.torch_ops import value_and_gradient
from convsim_init.functional.bank import accumulation_dtype, bank_weight, filter_bank, full_precision
from convsim_init.settings import Channels, Pairs


class Layout(NamedTuple):
    """How to read the weight of a convolution: its groups, and whether it is that of a transposed one."""

    groups: int = 1
    transposed: bool = False


def summed_similarity(
    weights: Sequence[Tensor], layouts: Sequence[Layout], pairs: Pairs, channels: Channels, *, normalized: bool
) -> Tensor:
    """Sum of `convolutional_similarity` over weights, on the device of the first; differentiable once.

    One node of the autograd graph for all of them: for small layers a node each costs more than the
    arithmetic.
    """
    total: Tensor = _Sum.apply(layouts, pairs, channels, normalized, *weights)  # type: ignore[no-untyped-call]
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layouts: Sequence[Layout], pairs: Pairs, channels: Channels, normalized: bool, *weights: Tensor
    ) -> Tensor:
        ctx.specs = [WeightSpec(w.shape, w.dtype, w.device, layout) for w, layout in zip(weights, layouts, strict=True)]
        ctx.weights = weights  # not saved for the backward pass: they may change until then
        values, gradients = [], []
        for spec, weight in zip(ctx.specs, weights, strict=True):
            value, gradient = _value_and_gradient(spec, weight, pairs, channels, normalized)
            values.append(value)
            gradients.append(gradient)
        ctx.save_for_backward(*gradients)
        return _total(values, weights[0])

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = [
                spec.weight((outer.to(spec.device) * gradient).to(spec.dtype))
                for spec, gradient in zip(ctx.specs, ctx.saved_tensors, strict=True)
            ]
        if torch.is_grad_enabled():  # a second derivative may follow
            gradients = list(map(_Once.apply, gradients, ctx.weights))
        return None, None, None, None, *gradients


class _Once(torch.autograd.Function):
    """A gradient that refuses to be differentiated: without it, it would silently count as constant."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, weight: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "ConvolutionalSimilarity is differentiable once: for second derivatives take convolutional_similarity"
        )


class WeightSpec(NamedTuple):
    """What is known of a weight before its values."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    layout: Layout

    def kernels(self, weight: Tensor) -> Tensor:
        """Its kernels ``[K, T]``, in the order of its filters."""
        if self.layout.transposed:
            weight = filter_bank(weight, groups=self.layout.groups, transposed=True)
        return weight.reshape(-1, self.shape[2:].numel())

    def weight(self, kernels: Tensor) -> Tensor:
        """The weight that has these kernels."""
        if self.layout.transposed:
            bank = kernels.view(_bank_shape(self, "matched"))
            return bank_weight(bank, groups=self.layout.groups, transposed=True)
        return kernels.view(self.shape)


def _value_and_gradient(
    spec: WeightSpec, weight: Tensor, pairs: Pairs, channels: Channels, normalized: bool
) -> tuple[float | Tensor, Tensor]:
    """The similarity of one weight, and its gradient by kernels ``[K, T]``."""
    kernels = spec.kernels(weight)
    # What only stands for a tensor, as under torch.compile, has no memory that C code could read.
    real = type(weight).__torch_dispatch__ is Tensor.__torch_dispatch__ and not torch.compiler.is_compiling()
    if real and fits(spec.dtype, spec.device, pairs, channels):
        kernels = kernels.resolve_neg().contiguous()
        gradient = torch.empty_like(kernels)
        value = _compiled(_bank_shape(spec, channels))(kernels, gradient, normalized=normalized)
        if value is not None:
            return value, gradient
    with full_precision(spec.device):
        kernels = kernels.to(accumulation_dtype(spec.dtype))
        return value_and_gradient(kernels, _bank_shape(spec, channels), pairs, channels, normalized=normalized)


def _total(values: Sequence[float | Tensor], first: Tensor) -> Tensor:
    """The sum of similarities, in the precision and on the device of the first weight's."""
    numbers = sum(value for value in values if isinstance(value, float))
    tensors = [value.to(first.device) for value in values if isinstance(value, Tensor)]
    if len(tensors) < len(values):
        tensors.append(torch.tensor(numbers, dtype=accumulation_dtype(first.dtype), device=first.device))
    return sum(tensors[1:], tensors[0])


@lru_cache(maxsize=256)
def _bank_shape(spec: WeightSpec, channels: Channels) -> torch.Size:
    """Shape ``[G, M, C, *kernel_size]`` of its filter bank."""
    empty = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
    return filter_bank(empty, **spec.layout._asdict(), channels=channels).shape


@lru_cache(maxsize=256)
def _compiled(shape: torch.Size) -> CompiledSimilarity:
    return CompiledSimilarity(shape)
