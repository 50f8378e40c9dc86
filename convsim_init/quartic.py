"""Where quartic polynomials stop falling: many at once, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

POLISH = 3  # steps of Newton's method
SETTLED = 1e-3  # of its largest term, what the slope may come to where it is said to vanish
FAR_OFF = 16  # units of rounding that 1 / t must have, next to the other coefficients, to be told from 0


def least_rise(first: Tensor, second: Tensor, third: Tensor, fourth: Tensor, *, otherwise: Tensor) -> Tensor:
    """The least positive t at which the quartics with the slopes ``first + second t + third t^2 + fourth t^3`` turn.

    The greatest root of the slope in 1/t, by Cardano's formula: there the coefficient to divide by is the slope at 0,
    which is never the one that vanishes.

    Args:
        first: Slope at 0, of any shape, as all of them.
        second: Coefficient of t in the slope.
        third: Coefficient of its square.
        fourth: Coefficient of its cube.
        otherwise: What to return where there is no such t, or a coefficient is not finite.
    """
    a, b, c = second / first, third / first, fourth / first  # u^3 + a u^2 + b u + c = 0 with u = 1 / t
    # In units of the largest root there can be, so that no power overflows.
    unit = torch.maximum(a.abs(), torch.maximum(b.abs().sqrt(), c.abs().pow(1 / 3)))
    a, b, c = a / unit, b / unit**2, c / unit**3
    p, q = (b - a.square() / 3) / 3, (2 * a**3 / 27 - a * b / 3 + c) / 2  # x^3 + 3 p x + 2 q = 0 with x = u + a / 3
    excess = q.square() + p**3
    single = -torch.sign(q) * (q.abs() + excess.clamp(min=0).sqrt()).pow(1 / 3)
    single = torch.where(single == 0, 0, single - p / single)
    radius = (-p).clamp(min=0).sqrt()
    triple = 2 * radius * torch.cos(torch.acos((-q / radius**3).clamp(-1, 1)) / 3)
    u = torch.where(excess > 0, single, torch.where(radius > 0, triple, 0)) - a / 3
    for _ in range(POLISH):
        step = (((u + a) * u + b) * u + c) / ((3 * u + 2 * a) * u + b)
        u = torch.where(step.abs() < u.abs() / 2, u - step, u)  # roots that meet are left alone
    terms = torch.stack([u**3, a * u.square(), b * u, c])
    found = (u > FAR_OFF * torch.finfo(u.dtype).eps) & (terms.sum(0).abs() <= SETTLED * terms.abs().amax(0))
    t = 1 / (u * unit)
    return torch.where(found & t.isfinite(), t, otherwise)
