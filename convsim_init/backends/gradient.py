"""Convolutional Similarity for training: the gradient in closed form, computed in the forward pass.

Letters: G groups, M filters of a group, C input channels of a group, T taps, K = G M C kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convsim_init.backends import compiled, gpu
from convsim_init.backends.compiled import CompiledSimilarity
from convsim_init.backends.torch_ops import value_and_gradient
from convsim_init.functional.bank import accumulation_dtype, bank_weight, filter_bank, full_precision
from convsim_init.settings import Channels, Pairs, may_use_kernels

_compiled = lru_cache(maxsize=256)(CompiledSimilarity)  # by the shape of the bank
MAX_GROUPS = 64  # of a fused layer: some of its programs run through all groups one after the other


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
        ctx.weights = weights  # save_for_backward would refuse weights that change before the backward pass
        found = [
            _value_and_gradient(weight, layout, pairs, channels, normalized)
            for weight, layout in zip(weights, layouts, strict=True)
        ]
        ctx.save_for_backward(*(gradient for _, gradient in found))
        return _total([value for value, _ in found], weights[0])

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = [
                gradient.to(weight.dtype)
                for gradient, weight in zip(_scaled(list(ctx.saved_tensors), outer), ctx.weights, strict=True)
            ]
        # In a backward pass gradients are enabled only where create_graph asked for a graph of it.
        if torch.is_grad_enabled():
            gradients = list(map(_Once.apply, gradients, ctx.weights))
        return None, None, None, None, *gradients


class _Once(torch.autograd.Function):
    """A gradient that refuses to be differentiated: without it, it would silently count as constant."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, weight: Tensor) -> Tensor:
        return gradient

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "ConvolutionalSimilarity is differentiable once: for second derivatives take convolutional_similarity"
        )


def _value_and_gradient(
    weight: Tensor, layout: Layout, pairs: Pairs, channels: Channels, normalized: bool
) -> tuple[float | Tensor, Tensor]:
    """The similarity of one weight, and its gradient, of the weight's shape."""
    shape, real = _bank_shape(weight.shape, weight.dtype, layout, channels), _has_memory(weight)
    ordered = filter_bank(weight, **layout._asdict()) if layout.transposed else weight  # its kernels as in the bank
    value: float | Tensor | None = None
    if real and compiled.fits(weight.dtype, weight.device, pairs, channels):
        # step.c reads memory, in which z.conj().imag has the other sign: its negative bit says so.
        kernels = ordered.resolve_neg().contiguous()
        gradient = torch.empty_like(kernels)
        value = _compiled(shape)(kernels, gradient, normalized=normalized)
    if value is None:
        with full_precision(weight.device):
            kernels = ordered.reshape(-1, shape[3:].numel()).to(accumulation_dtype(weight.dtype)).contiguous()  # [K, T]
            if real and may_use_kernels() and _has_fused(shape, kernels.dtype, weight.device, pairs, channels):
                from convsim_init.backends import fused_similarity

                kernels = kernels.resolve_neg()
                value, gradient = fused_similarity.value_and_gradient(kernels, shape, normalized=normalized)
            else:
                value, gradient = value_and_gradient(kernels, shape, pairs, channels, normalized=normalized)
    if layout.transposed:
        return value, bank_weight(gradient.view(shape), **layout._asdict())
    return value, gradient.view(weight.shape)


def _has_memory(weight: Tensor) -> bool:
    """Whether a kernel can read the weight's memory: FakeTensors, DTensors and the like have none of their own."""
    return type(weight).__torch_dispatch__ is Tensor.__torch_dispatch__


def _scaled(gradients: list[Tensor], outer: Tensor) -> Sequence[Tensor]:
    """The gradients times that of the sum; on a GPU together, which saves launches."""
    if outer.is_cuda and all(gradient.device == outer.device for gradient in gradients):
        with suppress(RuntimeError):  # where vmap batches the outer gradient
            return torch._foreach_mul(gradients, outer)
    return [gradient * outer.to(gradient.device) for gradient in gradients]


def _total(values: Sequence[float | Tensor], first: Tensor) -> Tensor:
    """The sum of similarities, in the precision and on the device of the first weight's."""
    dtype, device = accumulation_dtype(first.dtype), first.device
    tensors = [value.to(device) for value in values if isinstance(value, Tensor)]
    numbers = sum(value for value in values if isinstance(value, float))
    # step.c returns floats, which go to the device together, in one copy.
    if len(tensors) < len(values):
        tensors.append(torch.tensor(numbers, dtype=dtype, device=device))
    total = tensors[0] if len(tensors) == 1 else torch.stack(tensors).sum()
    return total.to(dtype)


@lru_cache(maxsize=256)
def _bank_shape(shape: torch.Size, dtype: torch.dtype, layout: Layout, channels: Channels) -> torch.Size:
    """Shape ``[G, M, C, *kernel_size]`` of a weight's filter bank."""
    return filter_bank(torch.empty(shape, dtype=dtype, device="meta"), **layout._asdict(), channels=channels).shape


# Cached, because every layer asks at every call, and Triton's driver takes its time to answer.
@lru_cache(maxsize=256)
def _has_fused(shape: torch.Size, dtype: torch.dtype, device: torch.device, pairs: Pairs, channels: Channels) -> bool:
    return shape[0] <= MAX_GROUPS and gpu.fits(shape, dtype, device, pairs, channels)
