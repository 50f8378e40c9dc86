"""The regularizer on a GPU in Triton kernels. As in `fused.py` a program takes some channels with all their filters.

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

from convsim_init.backends import fused
from convsim_init.backends.fused import SIZES, TILE, programs, rows, transform
from convsim_init.functional.fourier import real_fourier_basis

OPTIONS = fused.OPTIONS | {"maxnreg": 168}  # so that three programs share a processor


@triton.jit
def _spectra(kernels, scales, basis, here, taps: constexpr, freqs: constexpr):
    """Cosines and sines ``[F, TILE]`` of scaled kernels, from the sums and the differences of opposite taps."""
    scale = tl.load(scales, mask=here, other=0.0)
    sums, differences = (), ()
    for t in tl.static_range((taps + 1) // 2):
        two = here & (2 * t + 1 < taps)  # there is one tap in the middle
        ahead = (scale * tl.load(kernels + t, mask=here, other=0.0)).to(tl.float32)
        behind = (scale * tl.load(kernels + taps - 1 - t, mask=two, other=0.0)).to(tl.float32)
        sums += (ahead + behind,)
        differences += (ahead - behind,)
    return transform(sums + differences, basis, taps, freqs)


@triton.jit(do_not_specialize=SIZES)
def _differentiate(kernels, scales, grad, basis, shares, channels, filters, span, taps: constexpr, freqs: constexpr):
    """The gradient by the scaled filters, and the filters' shares of their similarity."""
    program, parts = tl.program_id(0), tl.cdiv(channels, span)
    group, first = program // parts, program % parts * span
    lane = tl.arange(0, TILE)
    for channel in range(first, tl.minimum(first + span, channels)):
        power = tl.zeros([freqs, TILE], tl.float32)
        for start in range(0, filters, TILE):
            here, own = start + lane < filters, group * filters + start + lane
            at = kernels + (own * channels + channel) * taps
            cosines, sines = _spectra(at, scales + own, basis, here, taps, freqs)
            power += cosines * cosines + sines * sines
        total = tl.sum(power, 1)
        for start in range(0, filters, TILE):
            here, own = start + lane < filters, group * filters + start + lane
            at = (own * channels + channel) * taps
            cosines, sines = _spectra(kernels + at, scales + own, basis, here, taps, freqs)
            power = cosines * cosines + sines * sines
            partners = total[:, None] - power
            known = start + lane < tl.where(channel > first, filters, 0)  # from the channels before
            to = shares + program * filters + start + lane
            before = tl.load(to, mask=known, other=0.0)
            tl.store(to, before + tl.sum(power * partners, 0) / 2, mask=here)
            cosines *= 2 * partners
            sines *= 2 * partners
            for t in tl.static_range((taps + 1) // 2):
                row = basis + t * freqs + tl.arange(0, freqs)
                even = tl.sum(tl.load(row)[:, None] * cosines, 0)
                odd = tl.sum(tl.load(row + (taps + 1) // 2 * freqs)[:, None] * sines, 0)  # 0 in the middle
                tl.store(grad + at + t, even + odd, mask=here)
                tl.store(grad + at + taps - 1 - t, even - odd, mask=here & (2 * t + 1 < taps))


@triton.jit(do_not_specialize=["size"])
def _scale(kernels, scales, size):
    """One over the norm of a filter of so many entries, or 0: in float64, where none vanishes or overflows."""
    squares = tl.zeros([TILE], tl.float64)
    for start in range(0, size, TILE):
        entry = start + tl.arange(0, TILE)
        values = tl.load(kernels + tl.program_id(0) * size + entry, mask=entry < size, other=0.0).to(tl.float64)
        squares += values * values
    norm = tl.sqrt(tl.sum(squares))
    tl.store(scales + tl.program_id(0), tl.where(norm == 0, 0.0, 1 / norm))


@triton.jit(do_not_specialize=["groups", "filters", "size"])
def _project(kernels, scales, grad, shares, value, groups, filters, size):
    """From the gradient g by unit filters u to that by filters w, ``(g - <g, u> u) / (|w| pairs)``; and the value.

    ``<g, u>`` is four times the filter's share, because the similarity is of degree four.
    """
    lane, own = tl.arange(0, TILE), tl.program_id(0)
    pairs, total = tl.zeros([], tl.float64), tl.zeros([TILE], tl.float64)
    for group in range(groups):
        active = tl.zeros([TILE], tl.float64)
        for start in range(0, filters, TILE):
            here, at = start + lane < filters, group * filters + start + lane
            active += tl.where(tl.load(scales + at, mask=here, other=0.0) > 0, 1.0, 0.0)
            total += tl.load(shares + at, mask=here, other=0.0)
        pairs += tl.sum(active) * (tl.sum(active) - 1) / 2
    pairs = tl.maximum(pairs, 1.0)
    tl.store(value, tl.sum(total) / pairs, mask=own == 0)
    scale = tl.load(scales + own)
    overlap = 4 * scale * tl.load(shares + own)
    for start in range(0, size, TILE):
        at, here = own * size + start + lane, start + lane < size
        found = tl.load(grad + at, mask=here, other=0.0) - overlap * tl.load(kernels + at, mask=here, other=0.0)
        tl.store(grad + at, (found * (scale / pairs)).to(tl.float32), mask=here)


def value_and_gradient(kernels: Tensor, shape: Sequence[int], *, normalized: bool) -> tuple[Tensor, Tensor]:
    """As in `torch_ops.py`, for all pairs and matched channels where `gpu.fits`; the value is in float64."""
    (groups, filters, channels), size = shape[:3], math.prod(shape[2:])
    span, parts = programs(groups, channels)
    basis, gradient = _basis(tuple(shape[3:]), kernels.device), torch.empty_like(kernels)
    shares = kernels.new_empty(groups, parts, filters, dtype=torch.float64)
    scales = kernels.new_empty(groups, filters, dtype=torch.float64)
    state, constants = (kernels, scales, gradient), (len(basis) - 1, basis.shape[1])
    with torch.cuda.device_of(kernels):
        if normalized:
            _scale[groups * filters,](kernels, scales, size, **OPTIONS)
        else:
            scales.fill_(1)
        _differentiate[groups * parts,](*state, basis, shares, channels, filters, span, *constants, **OPTIONS)
        if not normalized:
            return shares.sum(), gradient
        shares, value = shares.sum(1), scales.new_empty(())
        _project[groups * filters,](*state, shares, value, groups, filters, size, **OPTIONS)
        return value, gradient


@lru_cache(maxsize=256)
def _basis(kernel_size: tuple[int, ...], device: torch.device) -> Tensor:
    """The basis of `rows` for sums and differences of opposite taps: that of the first of them.

    Made on the CPU, from where the copy is waited for: whatever stream uses it next, it is there.
    """
    basis = real_fourier_basis(kernel_size, torch.float32, torch.device("cpu"))  # [N, T]
    frequencies, taps = len(basis) // 2 + 1, basis.shape[1]
    return rows(basis[:frequencies, : (taps + 1) // 2], basis[frequencies:, : taps // 2]).to(device)
