"""The formulas of a step against vectors that are really formed, and the whole against the textbook's algorithm."""

import itertools

import numpy as np
import pytest
import torch

from convsim_init.functional.bank import filter_norms, per_filter
from convsim_init.functional.similarity import bank_similarity
from convsim_init.optim import conjugate_gradient as cg
from convsim_init.optim.conjugate_gradient import ConjugateGradient
from convsim_init.parallel.threads import Team
from convsim_init.settings import Settings

STEP = 0.7
COUPLINGS = list(itertools.product(["all", "adjacent"], ["matched", "all"]))
BANKS = {"3x3": (1, 6, 5, 3, 3), "groups": (2, 4, 3, 2, 3), "even 1d": (1, 5, 3, 4), "1x1": (1, 5, 4, 1, 1)}


def unit(bank):
    return bank / per_filter(filter_norms(bank), bank)


def dot(a, b):
    """Inner products per filter, ``[G, M]``."""
    return (a * b).flatten(2).sum(-1)


def tangent(vector, weights):
    return vector - per_filter(dot(vector, weights), vector) * weights


@pytest.fixture
def line():
    """Unit filters, a direction that is tangent there, and where the retraction takes them; gradients at both ends."""
    w = unit(torch.randn(2, 4, 3, 3, 3, dtype=torch.float64))
    d = tangent(torch.randn_like(w), w)
    return w, d, unit(w - STEP * d), torch.randn_like(w), torch.randn_like(w)


def as_sums(values):
    return values[:, None].numpy()  # [G, 1, M]


def test_the_retraction_divides_by_the_length_of_what_it_moved(line):
    w, d, *_ = line
    found = cg.retracted_length(STEP, as_sums(dot(d, d)))
    np.testing.assert_allclose(found, as_sums(filter_norms(w - STEP * d)))


def test_transport_takes_the_radial_part_off_a_direction(line):
    _, d, moved, *_ = line
    radial = cg.transported_radial(STEP, as_sums(dot(d, d)))
    np.testing.assert_allclose(radial, -as_sums(dot(d, moved)), atol=1e-14)
    transported = d + per_filter(torch.from_numpy(radial)[:, 0], d) * moved
    torch.testing.assert_close(dot(transported, moved), torch.zeros(2, 4, dtype=torch.float64))
    np.testing.assert_allclose(as_sums(dot(d, d)) - radial**2, as_sums(dot(transported, transported)))


def test_the_overlap_of_gradients_needs_no_transported_gradient(line):
    w, d, moved, before, after = line
    gradient = tangent(after, moved)
    radial, length = dot(after, moved), filter_norms(w - STEP * d)
    overlap = cg.transported_overlap(
        float(dot(after, before).sum()),
        *(as_sums(radial), STEP, as_sums(length), as_sums(dot(before, w)), as_sums(dot(before, d))),
    )
    assert overlap == pytest.approx(float(dot(gradient, tangent(before, moved)).sum()))
    sq_norms = cg.tangent_sq_norm(as_sums(dot(after, after)), as_sums(radial))
    np.testing.assert_allclose(sq_norms, as_sums(dot(gradient, gradient)))


def test_the_norm_of_the_new_direction(line):
    _, d, moved, _, after = line
    gradient, transported, beta = tangent(after, moved), tangent(d, moved), 0.4
    new = gradient + beta * transported
    found = cg.direction_sq_norm(
        *(as_sums(dot(a, b)) for a, b in ((gradient, gradient), (gradient, transported), (transported, transported))),
        beta,
    )
    np.testing.assert_allclose(found, as_sums(dot(new, new)))


@pytest.mark.parametrize(("overlap", "beta"), [(3.0, 0.5), (4.0, 0.0), (5.0, 0.0)])
def test_polak_ribiere_is_never_negative(overlap, beta):
    assert cg.polak_ribiere(4.0, overlap, 2.0) == beta


def test_the_slope_is_the_derivative_of_the_quadratic_form():
    power, matrix = torch.randn(3, 7, dtype=torch.float64), torch.randn(7, 7, dtype=torch.float64)
    partners = matrix + matrix.T
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    p = power[0] - 2 * t * power[1] + t**2 * power[2]
    (wanted,) = torch.autograd.grad(p @ partners @ p / 2, t)
    a, b, c, d = cg.slope_coefficients(power @ partners @ power.T)
    assert a + b * 0.3 + c * 0.3**2 + d * 0.3**3 == pytest.approx(wanted.item())


@pytest.mark.parametrize(("pairs", "channels"), COUPLINGS)
@pytest.mark.parametrize("shape", BANKS.values(), ids=BANKS.keys())
@pytest.mark.parametrize("norm", ["preserve", "free"])
def test_it_is_the_textbooks_algorithm(shape, pairs, channels, norm):
    """Absil, Mahony, Sepulchre, algorithm 13, by vectors and autograd; only the step lengths are taken over.

    What is transported of the gradient before is what is stored of it: less what was radial a step earlier.
    """
    if channels == "all":
        shape = (1, shape[0] * shape[1], *shape[2:])
    settings, preserve = Settings(pairs=pairs, channels=channels, norm=norm), norm == "preserve"
    w = unit(torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    state = ConjugateGradient(w, torch.ones(shape[:2]), settings, Team(1))
    loss, direction, step = state.retract(0.0), torch.zeros_like(w), 0.0
    before, stored, shift = None, None, torch.zeros(shape[:2], dtype=torch.float64)
    for _ in range(5):
        leaf = w.clone().requires_grad_()
        value = bank_similarity(leaf, pairs, channels)
        assert loss == pytest.approx(value.item())
        (euclidean,) = torch.autograd.grad(value, leaf)
        gradient = tangent(euclidean, w) if preserve else euclidean
        turned_far = preserve and step**2 * float(dot(direction, direction).max()) > 1
        direction = tangent(direction, w) if preserve else direction
        beta = 0.0
        if before is not None:
            transported = tangent(stored, w) if preserve else stored
            beta = float((gradient * (gradient - transported)).sum()) / float(before.square().sum())
        ascends = float((gradient * (gradient + max(0, beta) * direction)).sum()) > 0
        direction = gradient + (max(0, beta) if ascends and not turned_far else 0) * direction
        before, step = gradient, state.next_direction()
        stored = euclidean - per_filter(shift, w) * w
        shift = dot(euclidean, w) if preserve else shift
        if step == 0:  # 1x1 kernels with all channels: the loss is constant
            assert float(gradient.abs().max()) < 1e-12
            break
        w = w - step * direction
        w = unit(w) if preserve else w
        loss = state.retract(step)
        if loss < 1e-12:  # of 1x1 kernels with all channels and free norms nothing is left, and rounding would decide
            break
    torch.testing.assert_close(state.into_bank(), w)
