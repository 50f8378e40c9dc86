"""The exact line search: the first minimum of a quartic polynomial, from the coefficients of its slope."""

from __future__ import annotations

import math
from itertools import pairwise

LONGEST = 1000.0  # the longest step that is looked for, over the one that is taken where there is no minimum
BISECTIONS = 60  # after so many an interval is no wider than rounding


def first_minimum(a: float, b: float, c: float, d: float, *, otherwise: float) -> float:
    """The least positive t at which the slope ``a + b t + c t^2 + d t^3`` changes its sign.

    It is ``otherwise`` where there is none up to a thousand times that, or where a coefficient is not finite.
    """
    longest = LONGEST * otherwise
    # In units of the longest step, so that all coefficients are of one size:
    b, c, d = b * longest, c * longest * longest, d * longest * longest * longest

    def slope(t: float) -> float:
        return ((d * t + c) * t + b) * t + a

    if not math.isfinite(abs(a) + abs(b) + abs(c) + abs(d)):
        return otherwise
    # Between the roots of its derivative b + 2 c t + 3 d t^2 the slope is monotonous, so that bisection
    # finds its only root there. The roots are q / 3d and b / q with q = -c -+ sqrt(c^2 - 3 b d), the sign
    # that of c: nothing cancels.
    q = -c - math.copysign(math.sqrt(max(0.0, c * c - 3 * b * d)), c)
    turns = [over / under for over, under in ((q, 3 * d), (b, q)) if under]
    # Just behind 0 the slope has the sign of its first coefficient that is not zero.
    rising = next((value > 0 for value in (a, b, c, d) if value), True)
    for low, high in pairwise([0.0, *sorted(turn for turn in turns if 0 < turn < 1), 1.0]):
        if (slope(high) >= 0) != rising:
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                low, high = (middle, high) if (slope(middle) >= 0) == rising else (low, middle)
            return high * longest
    return otherwise
