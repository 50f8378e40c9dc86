"""Nonlinear conjugate gradients on a product of spheres: the formulas of a step, with their derivation.

Problem. The filters of a layer are scaled to unit norm, w_1 ... w_M, so that they live on a product
of unit spheres; the loss f is their Convolutional Similarity, a homogeneous polynomial of degree 4.
Where norms are free there is no sphere: then every radial part below is zero and the retraction
is w - t d.

Gradient. The Riemannian gradient is the tangent part of the Euclidean gradient g, per filter:

    grad = g - r w,    r = <g, w>,    |grad|^2 = |g|^2 - r^2                                   (1)

Retraction. Steps go down a tangent direction d, which ascends, and are rescaled to the sphere:

    R(t) = (w - t d) / s,    s = sqrt(1 + t^2 |d|^2)                                           (2)

Transport. At R(t) the old direction is no longer tangent. Projecting it gives

    T d = d + q R(t),    q = -<d, R(t)> = t |d|^2 / s,    |T d|^2 = |d|^2 - q^2                (3)

and projecting the gradient of the step before, g_prev, as it was stored (see Precision), gives,
since grad is tangent, from its inner products with the old w and d, which are known,

    <grad, T g_prev> = <g, g_prev> - r <R(t), g_prev>
    <R(t), g_prev> = (<w, g_prev> - t <d, g_prev>) / s                                         (4)

Direction (Polak-Ribiere+), with one beta for the whole layer, sums running over all filters:

    beta = max(0, (sum |grad|^2 - sum <grad, T g_prev>) / sum |grad_prev|^2)
    d_new = grad + beta T d = g + beta d + (beta q - r) w                                      (5)
    |d_new|^2 = |grad|^2 + 2 beta <grad, T d> + beta^2 |T d|^2,    <grad, T d> = <g, d> + q r  (6)

It restarts with beta = 0, the direction of steepest descent, where the old direction says nothing of
the new one: after a failed line search, where a filter turned by more than 45 degrees, and where d_new
would not ascend.

Line search. A kernel's power spectrum at step t is, with the powers P0 of w and P2' of d and their
cross-power P1, to the second order in t: P(t) = P0 - 2 t P1 + t^2 P2, P2 = P2' - |d|^2 P0 (exact where
norms are free). The loss is the quadratic form f = <P, Q P> / 2 of the power, Q the sum over partners,
so along the line it is a quartic in t. Its coefficients are taken on a coarse lattice, where
correlations wrap around: the first minimum lies at nearly the same t, at less than half the work, and
a step is taken only if the loss itself is lower there. With c_ij = <P_i, Q P_j> the slope is

    f'(t) = -2 c01 + (4 c11 + 2 c02) t - 6 c12 t^2 + 2 c22 t^3                                 (7)

Precision. Close to a minimum g is nearly radial: r is hundreds of times |grad|, and in float32 (1)
would cancel. So what a pass over the weights stores and sums is the shifted gradient g - lambda w,
where lambda is r of the step before: what is left of r in it is small. The sums per filter are
exchanged and combined in float64. (As g_prev in (4) it differs from grad_prev by that rest along w;
taking it off too, by <grad, w_prev> = t <grad, T d>, lowered no layer's loss further.)

Source: Absil, Mahony, Sepulchre, *Optimization Algorithms on Matrix Manifolds* (2008), chapters 4
(line search and retractions) and 8.3 (conjugate gradients, vector transport).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convsim_init.backends.block import Block, cut_into_blocks
from convsim_init.functional.fourier import Fourier, Part
from convsim_init.optim.line_search import first_minimum
from convsim_init.parallel.threads import Team
from convsim_init.settings import Settings

NORM_TOLERANCE = 1e-3  # unit filters deviate by rounding only; beyond, f is not that of unit filters
MAX_TANGENT = 1.0  # of the angle, 45 degrees, that a filter turns before its old direction is dropped
ROUNDING = 8  # units of rounding of r below which a tangent gradient holds nothing else

PerFilter: TypeAlias = NDArray[np.float64]  # [G, 1, M]


def retracted_length(step: float, dir_sq_norm: PerFilter) -> PerFilter:
    """The length s of w - t d that the retraction divides by, equation (2)."""
    return np.sqrt(1 + step**2 * dir_sq_norm)


def transported_radial(step: float, dir_sq_norm: PerFilter) -> PerFilter:
    """The radial part q that transport takes off a direction, equation (3)."""
    return step * dir_sq_norm / retracted_length(step, dir_sq_norm)


def tangent_sq_norm(sq_norm: PerFilter, radial: PerFilter) -> PerFilter:
    """The squared norm of a vector less its radial part, equations (1) and (3); never negative."""
    return (sq_norm - radial**2).clip(min=0)


def transported_overlap(
    overlap: float, radial: PerFilter, step: float, length: PerFilter, prev_dot_w: PerFilter, prev_dot_dir: PerFilter
) -> float:
    """The sum over filters of <grad, T g_prev>, equation (4)."""
    return overlap - float((radial * ((prev_dot_w - step * prev_dot_dir) / length)).sum())


def polak_ribiere(grad_sq_norm: float, overlap: float, prev_grad_sq_norm: float) -> float:
    """The coefficient beta of the old direction, equation (5)."""
    return max(0.0, (grad_sq_norm - overlap) / prev_grad_sq_norm)


def direction_sq_norm(
    grad_sq_norm: PerFilter, grad_dot_dir: PerFilter, transported_sq_norm: PerFilter, beta: float
) -> PerFilter:
    """The squared norm of the new direction, equation (6); never negative."""
    return (grad_sq_norm + 2 * beta * grad_dot_dir + beta**2 * transported_sq_norm).clip(min=0)


def slope_coefficients(coefficients: Tensor) -> tuple[float, float, float, float]:
    """The coefficients of 1, t, t^2 and t^3 in the slope of the loss, equation (7)."""
    (_, c01, c02), (_, c11, c12), (_, _, c22) = coefficients.tolist()
    return -2 * c01, 4 * c11 + 2 * c02, -6 * c12, 2 * c22


class ConjugateGradient:
    """The filters of one layer, and the state of the conjugate gradients that move them.

    Order of calls: ``retract(0)`` once. Then, step by step, `next_direction`, which returns a step
    length, and `retract` to it; again to shorter ones where the loss is not lower. At the end
    `into_bank`, which empties it.

    The filters are those of a bank ``[G, M, C, *kernel_size]``, divided by a scale ``[G, M]``, where norms
    are preserved their norms (1 for zero). Where a mask, of the bank's shape, is zero, they stay zero: then
    the formulas above are those of the subspace.
    """

    def __init__(self, bank: Tensor, scale: Tensor, settings: Settings, team: Team, mask: Tensor | None = None) -> None:
        self._preserve = settings.norm == "preserve"
        self._team = team
        self._shape, self._like = bank.shape, bank.new_empty(0)
        self._fourier = Fourier(bank.shape[3:], bank.dtype, bank.device)
        self._blocks = list(cut_into_blocks(bank, scale, self._fourier, settings, mask))

        zeros = np.zeros((bank.shape[0], 1, bank.shape[1]))  # [G, 1, M], as all of these
        self._step = 0.0  # t: where the filters are along their directions
        self._norms = zeros + 1  # |w|: 1 up to rounding, which must not add up over the steps
        self._dir_sq_norm = zeros  # |d|^2
        self._shift = zeros  # lambda: subtracted from the gradient as lambda w before it is summed
        self._radial = zeros  # <g - lambda w, w>: what the shift has left of r
        self._grad_sq_norm = zeros  # |g - lambda w|^2
        self._grad_dot_dir = zeros  # <g - lambda w, d>
        self._grad_dot_prev = 0.0  # sum over filters of <g - lambda w, g_prev>
        self._prev_dot_w = zeros  # <w, g_prev>, of the step before and its shifted gradient
        self._prev_dot_dir = zeros  # <d, g_prev>, likewise
        self._prev_grad_sq_norm = math.inf  # sum over filters of |grad_prev|^2; at first beta is 0

    def into_bank(self) -> Tensor:
        """The weights where they are, ``[G, M, C, *kernel_size]``; the blocks are given up on the way."""

        def parts() -> Iterator[tuple[Part, Tensor]]:
            while self._blocks:
                block = self._blocks.pop()
                yield block.part, block.weights

        return self._fourier.bank(parts(), self._shape)

    def retract(self, step: float) -> float:
        """Move to R(step), from wherever the filters are along their directions; take the gradient there.

        Returns:
            Raw Convolutional Similarity there, or infinity where rounding has broken the norms.
        """
        old, new = self._length(self._step), self._length(step)
        # From (w - t_old d) / old to (w - t_new d) / new, in terms of where the weights are now.
        keep, add, shift = self._tensors(old / (new * self._norms), (self._step - step) / new, self._shift)

        def evaluate(block: Block) -> tuple[Tensor, float]:
            groups = block.part.groups
            return block.evaluate(keep[groups], add[groups], shift[groups])

        sums, overlaps = zip(*self._team.map(evaluate, self._blocks), strict=True)
        grad_dot_w, self._grad_sq_norm, self._grad_dot_dir, sq_norms = self._gather(sums)
        self._grad_dot_prev, self._step = sum(overlaps), step
        if self._preserve:
            self._norms = np.where(sq_norms > 0, np.sqrt(sq_norms), 1)
            self._radial = grad_dot_w / self._norms**2
            # Not `>`, which is false of NaN: that is broken, too.
            if not np.abs(self._norms - 1).max() <= NORM_TOLERANCE:
                return math.inf
        # Euler's theorem for a polynomial of degree 4: 4 f = <g, w>, with the shift put back.
        return float((grad_dot_w + self._shift * sq_norms).sum()) / 4

    def next_direction(self, *, restart: bool = False) -> float:
        """Turn to the next conjugate direction, and find the first minimum along it.

        Args:
            restart: Take steepest descent, because the line search before failed.

        Returns:
            The step length, equation (7); 0 where there is nowhere to go.
        """
        step, radial, dir_sq_norm = self._step, self._radial, self._dir_sq_norm
        # q, which is zero where norms are free, as r is: nothing is radial there.
        dir_radial = transported_radial(step, dir_sq_norm) if self._preserve else np.zeros_like(radial)
        grad_sq_norm = tangent_sq_norm(self._grad_sq_norm, radial)
        grad_dot_dir = self._grad_dot_dir + dir_radial * radial
        total = float(grad_sq_norm.sum())
        full_radial = self._shift + radial  # r itself, next to which rounding is measured
        rounding = (ROUNDING * torch.finfo(self._like.dtype).eps) ** 2 * float((full_radial**2).sum())
        if total <= rounding:
            return 0.0

        overlap = transported_overlap(
            self._grad_dot_prev, radial, step, self._length(step), self._prev_dot_w, self._prev_dot_dir
        )
        beta = polak_ribiere(total, overlap, self._prev_grad_sq_norm)
        # 1.01: a step of just 45 degrees, which the line search takes where it finds no minimum, is no reason.
        turned_far = self._preserve and step**2 * float(dir_sq_norm.max()) > 1.01 * MAX_TANGENT**2
        # <grad, d_new> = sum |grad|^2 + beta sum <grad, T d> is the slope along d_new, which has to ascend.
        no_ascent = total + beta * float(grad_dot_dir.sum()) <= 0
        if restart or turned_far or no_ascent:
            beta = 0.0
        transported_sq_norm = dir_sq_norm - dir_radial**2
        new_sq_norm = direction_sq_norm(grad_sq_norm, grad_dot_dir, transported_sq_norm, beta)  # |d_new|^2
        retraction = -new_sq_norm if self._preserve else np.zeros_like(new_sq_norm)  # its part of P2
        weight_coefficient, curvature = self._tensors(beta * dir_radial - radial, retraction)

        def turn(block: Block) -> Tensor:
            groups = block.part.groups
            return block.turn(beta, weight_coefficient[groups], curvature[groups])

        # Last block first: what was passed over last is still in the cache.
        parts = [part.cpu() for part in self._team.map(turn, self._blocks[::-1])]
        coefficients = torch.stack(parts).sum(0, dtype=torch.float64)
        # For (4), when the gradient stored now is g_prev: <w, g_prev> is what the shift left of r,
        # and <d, g_prev> = <d_new, grad>, since d_new is tangent.
        self._prev_dot_w, self._prev_dot_dir = radial, grad_sq_norm + beta * grad_dot_dir
        self._dir_sq_norm, self._prev_grad_sq_norm = new_sq_norm, total
        self._shift, self._step = full_radial, 0.0
        # |grad|^2 is a difference and may be more than there is to follow: then the direction is rounding.
        fastest = float(new_sq_norm.max())
        if float(new_sq_norm.sum()) <= rounding or not fastest:
            return 0.0
        # Where the expansion falls for ever, turn the fastest filter by 45 degrees and see.
        return first_minimum(*slope_coefficients(coefficients), otherwise=MAX_TANGENT / math.sqrt(fastest))

    def _length(self, step: float) -> PerFilter:
        """As `retracted_length`; 1 where norms are free."""
        return retracted_length(step, self._dir_sq_norm) if self._preserve else np.ones_like(self._dir_sq_norm)

    def _gather(self, parts: Sequence[Tensor]) -> NDArray[np.float64]:
        """Sums over blocks of several values per filter ``[n, g, M]``, in a fixed order: ``[n, G, 1, M]``."""
        total = np.zeros((len(parts[0]), *self._dir_sq_norm.shape))
        for block, part in zip(self._blocks, parts, strict=True):
            total[:, block.part.groups, 0] += part.cpu().numpy()
        return total

    def _tensors(self, *values: PerFilter) -> Tensor:
        """Several values per filter where the weights are, ``[n, G, 1, M]``: one copy, and no wait for it."""
        return torch.from_numpy(np.stack(values)).to(self._like, non_blocking=True)
