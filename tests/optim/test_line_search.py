"""The first minimum of a quartic, against the roots that numpy finds."""

import math

import numpy as np
import pytest

from convsim_init.optim.line_search import LONGEST, first_minimum


def first_sign_change(a, b, c, d):
    roots = np.roots([d, c, b, a])
    real = sorted(root.real for root in roots if abs(root.imag) < 1e-9 * abs(root) and root.real > 0)
    return real[0] if real else None


@pytest.mark.parametrize("seed", range(200))
def test_it_is_the_least_positive_root_of_the_slope(seed):
    a, b, c, d = np.random.default_rng(seed).normal(size=4) * [-1, 1, 1, 1]
    a = -abs(a)  # downhill
    found, wanted = first_minimum(a, b, c, d, otherwise=0.25), first_sign_change(a, b, c, d)
    if wanted is None or wanted > LONGEST * 0.25:
        assert found == 0.25
    else:
        assert found == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(
    ("slope", "step"),
    [
        pytest.param((-2.0, 1.0, 0.0, 0.0), 2.0, id="parabola"),
        pytest.param((-6.0, 11.0, -6.0, 1.0), 1.0, id="the first of three roots"),
        pytest.param((-1.0, 0.0, 0.0, 1e-6), 100.0, id="far away"),
        pytest.param((-1e-30, 1e-12, 0.0, 0.0), 1e-18, id="very near"),
        pytest.param((-1.0, -1.0, 0.0, 0.0), 0.5, id="falls for ever"),
        pytest.param((-1.0, 0.0, 0.0, 0.0), 0.5, id="a line"),
        pytest.param((0.0, 0.0, 0.0, 0.0), 0.5, id="flat"),
        pytest.param((-1.0, 1e-5, 0.0, 0.0), 0.5, id="farther than is looked"),
        pytest.param((math.nan, 1.0, 1.0, 1.0), 0.5, id="not a number"),
        pytest.param((-1.0, 1e308, 1e308, 1e308), 0.5, id="overflows"),
    ],
)
def test_special_slopes(slope, step):
    assert first_minimum(*slope, otherwise=0.5) == pytest.approx(step, rel=1e-9)
