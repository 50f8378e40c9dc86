"""The two passes of a conjugate-gradient step on a GPU, one Triton kernel each: float32, the defaults.

A program takes some channels of a group with all of their filters, because the sum over pairs is one
over the filters of a channel. A thread holds whole columns: all frequencies of a kernel's spectrum.
Taps are the rows of ``[T, g, c, M]``, so threads side by side read filters side by side. All taps are read
before the first is written: no compiler moves a load ahead of a store that may be to the same place, and
then each tap would wait for the memory anew.

A step must move 9 values a weight: here it moves them, and 5 sums for each filter and program. No
atomics: each program writes its own sums in float32, and these are added in float64 in a fixed order.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from convsim_init.backends.gpu import MAX_WEIGHTS
from convsim_init.functional.fourier import Fourier, Part
from convsim_init.settings import Settings

MIN_PROGRAMS, MAX_CHANNELS = 1024, 16  # some programs for each of a GPU's processors; channels of one
TILE: constexpr = constexpr(128)  # filters at a time, one a thread
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True, "maxnreg": 168}  # so that three programs share a processor
SIZES = ["channels", "filters", "span"]  # with Triton's special cases each would compile anew


@triton.jit
def transform(values, basis, taps: constexpr, freqs: constexpr):
    """Cosines and sines ``[F, TILE]`` of kernels, from a tuple of their coordinates ``[TILE]``, even ones first."""
    cosines, sines = tl.zeros([freqs, TILE], tl.float32), tl.zeros([freqs, TILE], tl.float32)
    for t in tl.static_range(taps):
        row = tl.load(basis + t * freqs + tl.arange(0, freqs))
        if t < (taps + 1) // 2:
            cosines += row[:, None] * values[t][None, :]
        else:
            sines += row[:, None] * values[t][None, :]
    return cosines, sines


@triton.jit(do_not_specialize=["keep", "add", "shift", *SIZES])
def _evaluate(
    weights, direction, grad, keep, add, shift, basis, sums,
    channels, filters, span, taps: constexpr, freqs: constexpr, moves: constexpr = True
):  # fmt: skip
    """`Block.evaluate`; the gradient before is read where the new one is written.

    Where nothing moves it is that of the weights as they are, and nothing else is read.
    """
    program, parts = tl.program_id(0), tl.cdiv(channels, span)
    group, first = program // parts, program % parts * span
    taps_stride = tl.num_programs(0) // parts * channels * filters
    frequency, lane = tl.arange(0, freqs), tl.arange(0, TILE)
    for channel in range(first, tl.minimum(first + span, channels)):
        row = (group * channels + channel) * filters
        power = tl.zeros([freqs, TILE], tl.float32)
        for start in range(0, filters, TILE):
            here, own = start + lane < filters, group * filters + start + lane
            factor = tl.load(keep + own, mask=here & moves, other=1.0)
            step = tl.load(add + own, mask=here & moves, other=0.0)
            moved = ()
            for t in tl.static_range(taps):
                at = t * taps_stride + row + start + lane
                w = factor * tl.load(weights + at, mask=here, other=0.0)
                moved += (w + step * tl.load(direction + at, mask=here & moves, other=0.0),)
            for t in tl.static_range(taps):
                tl.store(weights + (t * taps_stride + row + start + lane), moved[t], mask=here)
            cosines, sines = transform(moved, basis, taps, freqs)
            power += cosines * cosines + sines * sines
        total = tl.sum(power, 1)
        tl.debug_barrier()  # what is read below may have been written by another thread
        for start in range(0, filters, TILE):
            here, own = start + lane < filters, group * filters + start + lane
            lift = tl.load(shift + own, mask=here & moves, other=0.0) / 2
            ws = ()
            for t in tl.static_range(taps):
                ws += (tl.load(weights + (t * taps_stride + row + start + lane), mask=here, other=0.0),)
            cosines, sines = transform(ws, basis, taps, freqs)
            # The shift is subtracted from the partners' power, before anything cancels.
            unit = tl.load(basis + taps * freqs + frequency)
            partners = total[:, None] - (cosines * cosines + sines * sines) - unit[:, None] * lift[None, :]
            cosines *= 2 * partners
            sines *= 2 * partners
            zeros = tl.zeros([TILE], tl.float32)
            dot_w, sq_norm, dot_dir, w_sq_norm, dot_prev = zeros, zeros, zeros, zeros, zeros
            for t in tl.static_range(taps):
                at = t * taps_stride + row + start + lane
                spectrum = cosines if t < (taps + 1) // 2 else sines
                new = tl.sum(tl.load(basis + t * freqs + frequency)[:, None] * spectrum, 0)
                dot_w += new * ws[t]
                sq_norm += new * new
                dot_dir += new * tl.load(direction + at, mask=here & moves, other=0.0)
                w_sq_norm += ws[t] * ws[t]
                dot_prev += new * tl.load(grad + at, mask=here & moves, other=0.0)
                tl.store(grad + at, new, mask=here)
            to = sums + program * 5 * filters + start + lane
            known = start + lane < tl.where(channel > first, filters, 0)  # from the channels before
            found = dot_w, sq_norm, dot_dir, w_sq_norm, dot_prev
            for i in tl.static_range(5 if moves else 1):
                tl.store(to, found[i] + tl.load(to, mask=known, other=0.0), mask=here)
                to += filters


@triton.jit
def _add_products(sums, a, b, c):
    """The inner products of powers at step 0, 1 and 2, in the order of `Block.turn`, added to five sums."""
    ab, ac, bb, bc, cc = tl.sum(a * b, 0), tl.sum(a * c, 0), tl.sum(b * b, 0), tl.sum(b * c, 0), tl.sum(c * c, 0)
    return sums[0] + ab, sums[1] + ac, sums[2] + bb, sums[3] + bc, sums[4] + cc


@triton.jit(do_not_specialize=["beta", "turn", "bend", *SIZES])
def _turn(
    weights, direction, grad, beta, turn, bend, basis, sums, channels, filters, span, taps: constexpr, freqs: constexpr
):
    """`Block.turn`: each program's part of c01, c02, c11, c12 and c22."""
    program, parts = tl.program_id(0), tl.cdiv(channels, span)
    group, first = program // parts, program % parts * span
    taps_stride = tl.num_programs(0) // parts * channels * filters
    lane = tl.arange(0, TILE)
    nothing = tl.zeros([freqs, TILE], tl.float32)
    zeros, zero = tl.zeros([TILE], tl.float32), tl.zeros([], tl.float32)
    own = zeros, zeros, zeros, zeros, zeros  # of filters with themselves
    every = zero, zero, zero, zero, zero  # of all filters with all
    for channel in range(first, tl.minimum(first + span, channels)):
        row = (group * channels + channel) * filters
        power0, power1, power2 = nothing, nothing, nothing
        for start in range(0, filters, TILE):
            here, at = start + lane < filters, group * filters + start + lane
            factor = tl.load(turn + at, mask=here, other=0.0)
            curvature = tl.load(bend + at, mask=here, other=0.0)
            ws, ds = (), ()
            for t in tl.static_range(taps):
                at = t * taps_stride + row + start + lane
                w = tl.load(weights + at, mask=here, other=0.0)
                d = tl.load(grad + at, mask=here, other=0.0) + factor * w
                ws += (w,)
                ds += (d + beta * tl.load(direction + at, mask=here, other=0.0),)
            for t in tl.static_range(taps):
                tl.store(direction + (t * taps_stride + row + start + lane), ds[t], mask=here)
            w_cosines, w_sines = transform(ws, basis, taps, freqs)
            d_cosines, d_sines = transform(ds, basis, taps, freqs)
            p0 = w_cosines * w_cosines + w_sines * w_sines
            p1 = w_cosines * d_cosines + w_sines * d_sines
            p2 = d_cosines * d_cosines + d_sines * d_sines + curvature[None, :] * p0
            power0 += p0
            power1 += p1
            power2 += p2
            own = _add_products(own, p0, p1, p2)
        every = _add_products(every, tl.sum(power0, 1), tl.sum(power1, 1), tl.sum(power2, 1))
    at = 1, 2, 4, 5, 8  # in the matrix
    for i in tl.static_range(5):
        tl.store(sums + program * 9 + at[i], every[i] - tl.sum(own[i]))


class FusedBlock:
    """A `Block` for what the defaults need: float32 on CUDA, all pairs, matched channels, small kernels.

    A step waits for the GPU twice, for the sums of either pass.
    """

    max_weights = MAX_WEIGHTS

    def __init__(
        self, part: Part, weights: Tensor, fourier: Fourier, settings: Settings, memory: threading.local
    ) -> None:
        self.part = part
        self.weights = weights  # [T, g, c, M]
        self._direction, self._gradient = torch.zeros_like(weights), torch.zeros_like(weights)
        taps, group_count, channel_count, filters = weights.shape
        span, parts = programs(group_count, channel_count)
        self._grid, self._sizes = (group_count * parts,), (channel_count, filters, span)
        self._basis, self._coarse_basis = (rows(basis.first, basis.second) for basis in (fourier.full, fourier.coarse))
        self._basis[taps, : len(fourier.identity)] = fourier.identity.flatten()
        self._sums = weights.new_empty(group_count, parts, 5, filters)
        self._coefficients = weights.new_zeros(group_count * parts, 3, 3)

    def evaluate(self, keep: Tensor, add: Tensor, shift: Tensor) -> tuple[Tensor, float]:
        """As `Block.evaluate`."""
        self._launch(_evaluate, (keep, add, shift), self._basis, self._sums)
        sums = self._sums.sum(1, dtype=torch.float64).cpu()  # [g, 5, M]
        return sums[:, :4].transpose(0, 1), float(sums[:, 4].sum())

    def turn(self, beta: float, weight_coefficient: Tensor, curvature: Tensor) -> Tensor:
        """As `Block.turn`."""
        self._launch(_turn, (beta, weight_coefficient, curvature), self._coarse_basis, self._coefficients)
        return self._coefficients.sum(0, dtype=torch.float64).cpu()

    def _launch(self, kernel: Any, factors: tuple[Tensor | float, ...], basis: Tensor, sums: Tensor) -> None:
        state, taps = (self.weights, self._direction, self._gradient), len(self.weights)
        with torch.cuda.device_of(basis):
            kernel[self._grid](*state, *factors, basis, sums, *self._sizes, taps, basis.shape[1], **OPTIONS)


def programs(groups: int, channels: int) -> tuple[int, int]:
    """How many channels a program takes, and how many programs a group has."""
    span = min(MAX_CHANNELS, max(1, groups * channels // MIN_PROGRAMS))
    return span, triton.cdiv(channels, span)


def rows(cosines: Tensor, sines: Tensor) -> Tensor:
    """The basis of `transform`, ``[T + 1, F]``: a row for each coordinate, and zeros; F is padded to a power of 2."""
    frequencies, even = cosines.shape
    taps = even + sines.shape[1]
    padded = cosines.new_zeros(taps + 1, max(2, triton.next_power_of_2(frequencies)))
    padded[:even, :frequencies] = cosines.T
    padded[even:taps, 1:frequencies] = sines.T
    return padded
