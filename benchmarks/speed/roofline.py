"""Rows of the speed benchmark about what a step makes of the machine: bytes and operations a second."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from statistics import median

from benchmarks.machine import copy_rate, in_turn, product_rate
from benchmarks.speed.commands import Row
from benchmarks.speed.descents import time_step
from benchmarks.speed.shapes import Shape, draw, text

SHAPES = [(64, 64, 3, 3), (512, 512, 3, 3), (1024, 1024, 1, 1)]
GIGA = 1e9


def step_bytes(shape: Shape) -> int:
    """Bytes that a step of conjugate gradients moves at least, where no weight stays in a cache.

    It passes over a layer twice. The first pass reads weights, direction and the gradient before, and writes weights
    and gradient; the second, which needs sums over the first, reads weights, gradient and direction, and writes the
    direction: 9 float32 values a weight.
    """
    return 4 * 9 * math.prod(shape)


def step_operations(shape: Shape) -> int:
    """Additions and multiplications of a step of conjugate gradients, for kernels with odd sides.

    With T taps a kernel (t even coordinates and T - t odd ones) and N points of the lattice of its correlations (F
    cosines and N - F sines):

    - matrix products, the transform and its adjoint: 4 (F t + (N - F) (T - t)), which is 452 for 3×3
    - in the power spectrum, its sum and that of partners, and the gradient's: 3 N + 4 F
    - taps: 3 to move a weight, 2 to take what lies along a filter from the gradient and 4 to make the direction; 2 in
      each of 5 inner products: 19 T
    - down the direction: three power spectra, 5 T, the sums of partners in two, 4 t, and five inner products, 10 t
    """
    taps, points = math.prod(shape[2:]), math.prod(2 * k - 1 for k in shape[2:])
    even, cosines = (taps + 1) // 2, (points + 1) // 2
    products = 4 * (cosines * even + (points - cosines) * (taps - even))
    spectrum = 3 * points + 4 * cosines
    look = 5 * taps + 14 * even
    return (products + spectrum + 19 * taps + look) * shape[0] * shape[1]


def roofline_rows(repeats: int) -> Iterator[Row]:
    """Rates of a step against those of a copy and of a matrix product, in turn."""
    parts = [copy_rate, product_rate, *(partial(time_step, draw(shape)) for shape in SHAPES)]
    copied, multiplied, *times = map(median, in_turn(parts, repeats))
    for shape, seconds in zip(SHAPES, times, strict=True):
        rates = (
            ("bytes moved, at least", step_bytes(shape) / seconds, "B/s", "a copy", copied),
            ("operations", step_operations(shape) / seconds, "flop/s", "a product of 2048×2048", multiplied),
        )
        for what, ours, unit, peer, theirs in rates:
            yield (
                f"{what}, one step on {text(shape)}, {1e3 * seconds:.2f} ms",
                f"{ours / GIGA:.1f} G{unit}",
                f"{peer} {theirs / GIGA:.1f} G{unit}",
                f"{ours / theirs:.2f}",
                "",
            )
