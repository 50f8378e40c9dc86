"""The regularizer on a GPU: filters are scaled and folded, and their gradient is found by the kernel of a step.

Letters: G groups, M filters of a group, C input channels of a group, T taps, K = G M C kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from convsim_init.backends.fused import OPTIONS, TILE, _evaluate, programs, rows
from convsim_init.functional.fourier import real_fourier_basis


@triton.jit(do_not_specialize=["channels", "filters"])
def _fold(kernels, scales, unit, channels, filters, taps: constexpr, normalized: constexpr):
    """Sums and differences of opposite taps of a filter over its norm, from ``[G, M, C, T]`` to ``[T, G, C, M]``."""
    own, size, lane = tl.program_id(0), channels * taps, tl.arange(0, TILE)
    rest, scale = tl.num_programs(0) * channels, 1.0
    if normalized:
        squares = tl.zeros([TILE], tl.float64)  # where none vanishes or overflows
        for start in range(0, size, TILE):
            at = kernels + own * size + start + lane
            values = tl.load(at, mask=start + lane < size, other=0.0).to(tl.float64)
            squares += values * values
        norm = tl.sqrt(tl.sum(squares))
        scale = tl.where(norm == 0, 0.0, 1 / norm)
    tl.store(scales + own, scale)
    for start in range(0, channels, TILE):
        channel, here = start + lane, start + lane < channels
        at, to = own * size + channel * taps, (own // filters * channels + channel) * filters + own % filters
        for t in tl.static_range((taps + 1) // 2):
            two = here & (2 * t + 1 < taps)  # there is one tap in the middle
            ahead = (scale * tl.load(kernels + at + t, mask=here, other=0.0)).to(tl.float32)
            behind = (scale * tl.load(kernels + at + taps - 1 - t, mask=two, other=0.0)).to(tl.float32)
            tl.store(unit + to + t * rest, ahead + behind, mask=here)
            tl.store(unit + to + ((taps + 1) // 2 + t) * rest, ahead - behind, mask=two)


@triton.jit(do_not_specialize=["groups", "channels", "filters"])
def _unfold(kernels, scales, grad, sums, to, value, groups, channels, filters, taps: constexpr, normalized: constexpr):
    """From the gradient g by folded unit filters u to that by filters w, ``(g - <g, u> u) / (|w| pairs)``; the value.

    That is a quarter of the sum of all ``<g, u>``, because the similarity is of degree four.
    """
    own, size, lane = tl.program_id(0), channels * taps, tl.arange(0, TILE)
    rest, pairs, total = tl.num_programs(0) * channels, tl.zeros([], tl.float64), tl.zeros([TILE], tl.float64)
    for group in range(groups):
        active = tl.zeros([TILE], tl.float64)
        for start in range(0, filters, TILE):
            here, at = start + lane < filters, group * filters + start + lane
            active += tl.where(tl.load(scales + at, mask=here, other=0.0) > 0, 1.0, 0.0)
            total += tl.load(sums + at, mask=here, other=0.0)
        pairs += tl.sum(active) * (tl.sum(active) - 1) / 2
    pairs = tl.maximum(pairs, 1.0)
    scale, overlap = tl.load(scales + own), tl.load(sums + own)
    if not normalized:
        pairs, overlap = 1.0, 0.0
    tl.store(value, tl.sum(total) / (4 * pairs), mask=own == 0)
    for start in range(0, channels, TILE):
        channel, here = start + lane, start + lane < channels
        at, folded = own * size + channel * taps, (own // filters * channels + channel) * filters + own % filters
        for t in tl.static_range((taps + 1) // 2):
            two = here & (2 * t + 1 < taps)
            even = tl.load(grad + folded + t * rest, mask=here, other=0.0)
            odd = tl.load(grad + folded + ((taps + 1) // 2 + t) * rest, mask=two, other=0.0)
            ahead = even + odd - overlap * scale * tl.load(kernels + at + t, mask=here, other=0.0)
            behind = even - odd - overlap * scale * tl.load(kernels + at + taps - 1 - t, mask=two, other=0.0)
            tl.store(to + at + t, (ahead * (scale / pairs)).to(tl.float32), mask=here)
            tl.store(to + at + taps - 1 - t, (behind * (scale / pairs)).to(tl.float32), mask=two)


def value_and_gradient(kernels: Tensor, shape: Sequence[int], *, normalized: bool) -> tuple[Tensor, Tensor]:
    """As in `torch_ops.py`, for all pairs and matched channels where `gpu.fits`; the value is in float64."""
    (groups, filters, channels), taps = shape[:3], math.prod(shape[3:])
    span, parts = programs(groups, channels)
    basis = _basis(tuple(shape[3:]), kernels.device)
    unit, grad, gradient = (torch.empty_like(kernels) for _ in range(3))
    sizes64 = (groups, parts, 5, filters), (groups, filters), ()
    partial, scales, value = (kernels.new_empty(size, dtype=torch.float64) for size in sizes64)
    sizes = channels, filters, taps
    with torch.cuda.device_of(kernels):
        _fold[groups * filters,](kernels, scales, unit, *sizes, normalized, **OPTIONS)
        state = unit, unit, grad, unit, unit, unit, basis, partial
        _evaluate[groups * parts,](*state, channels, filters, span, taps, basis.shape[1], moves=False, **OPTIONS)
        sums = partial[:, :, 0].sum(1)
        _unfold[groups * filters,](kernels, scales, grad, sums, gradient, value, groups, *sizes, normalized, **OPTIONS)
    return value, gradient


@lru_cache(maxsize=256)
def _basis(kernel_size: tuple[int, ...], device: torch.device) -> Tensor:
    """The basis of `rows` for sums and differences of opposite taps: that of the first of them.

    Made on the CPU, from where the copy is waited for: whatever stream uses it next, it is there.
    """
    basis = real_fourier_basis(kernel_size, torch.float32, torch.device("cpu"))  # [N, T]
    frequencies, taps = len(basis) // 2 + 1, basis.shape[1]
    return rows(basis[:frequencies, : (taps + 1) // 2], basis[frequencies:, : taps // 2]).to(device)
