"""Where quartic polynomials stop falling: one, in numbers; or many at once, without waiting for the device."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

NEAREST, FARTHEST, POINTS = -18, 3, 4096  # powers of ten between which to look, and at how many points
HALVINGS = 60  # of an interval, until nothing but rounding is left of it
POLISH = 3  # steps of Newton's method from the nearest point, 0.6 % off: each squares the error


def first_rise(first: float, second: float, third: float, fourth: float, *, otherwise: float) -> float:
    """As `least_rise`, for one."""
    farthest = 10.0**FARTHEST * otherwise
    # In shares of that distance:
    a, b, c, d = first, second * farthest, third * farthest * farthest, fourth * farthest * farthest * farthest

    def slope(t: float) -> float:
        return ((d * t + c) * t + b) * t + a

    if not math.isfinite(abs(a) + abs(b) + abs(c) + abs(d)):
        return otherwise
    half = -c - math.copysign(math.sqrt(max(0.0, c * c - 3 * b * d)), c)
    turns = [over / under for over, under in ((half, 3 * d), (b, half)) if under]  # of the slope, where it has any
    rising = next((value > 0 for value in (a, b, c, d) if value), True)
    for low, high in pairwise([0.0, *sorted(turn for turn in turns if 0 < turn < 1), 1.0]):
        if (slope(high) >= 0) != rising:
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                low, high = (middle, high) if (slope(middle) >= 0) == rising else (low, middle)
            return high * farthest
    return otherwise


def least_rise(first: Tensor, second: Tensor, third: Tensor, fourth: Tensor, *, otherwise: Tensor) -> Tensor:
    """The least positive t at which the slopes ``first + second t + third t^2 + fourth t^3`` change their sign.

    Args:
        first: Of any shape, as all of them; not to be waited for.
        second: Coefficient of t.
        third: Coefficient of its square.
        fourth: Coefficient of its cube.
        otherwise: The unit in which t is expected, and what to return where there is none up to a thousand times it,
            or a coefficient is not finite.
    """
    a, b, c, d = first, second * otherwise, third * otherwise.square(), fourth * otherwise.pow(3)
    points = torch.logspace(NEAREST, FARTHEST, POINTS, dtype=first.dtype, device=first.device)
    slopes = torch.addcmul(c[..., None], d[..., None], points)
    slopes = torch.addcmul(b[..., None], slopes, points)
    rises = torch.addcmul(a[..., None], slopes, points) >= 0  # [..., POINTS]
    turns = rises[..., 1:] ^ rises[..., :-1]
    low = points[turns.to(torch.uint8).argmax(-1)]  # the first of them
    high = low * 10 ** ((FARTHEST - NEAREST) / (POINTS - 1))
    t = (low + high) / 2
    for _ in range(POLISH):
        bend = torch.addcmul(c, d, t)  # of the slope: value and derivative by Horner's rule
        tilt = torch.addcmul(b, bend, t)
        derivative = torch.addcmul(tilt, torch.addcmul(bend, d, t), t)
        t = torch.fmin(torch.fmax(t - torch.addcmul(a, tilt, t) / derivative, low), high)
    finite = (a + b + c + d).isfinite()
    return torch.where(turns.any(-1) & finite, t, 1) * otherwise
