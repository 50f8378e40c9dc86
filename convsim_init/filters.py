"""The filters of one layer on their way down: the arithmetic of a conjugate-gradient step.

A layer is cut into blocks ``[T, g, c, M]`` (T taps a kernel, g groups, c input channels, M filters), and a step passes
over each block twice: `Filters.arrive` moves the weights and takes the gradient there, `Filters.aim` turns the
direction and looks along it. Between the passes only sums per filter are exchanged.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from convsim_init.fourier import Fourier, Halves
from convsim_init.parallel import Team
from convsim_init.settings import Settings
from convsim_init.similarity import nonzero, partner_power

TRUSTED = 1e-3  # the norms of unit filters deviate by rounding only; by more, the loss is not that of unit filters
FAR = 1.0  # squared tangent of the angle, 45 degrees, beyond which a filter's old direction says nothing of the new
ROUNDING = 8  # a gradient so many units of rounding long, next to what was taken from it, holds nothing else


class Filters:
    """A layer's filters, and the state of the conjugate gradients that move them.

    Args:
        bank: ``[G, M, C, *kernel_size]``; where norms are preserved, of unit filters (or filters that are zero).
        settings: Which similarity is lowered, and whether norms are preserved.
        team: Who works on the blocks.
    """

    def __init__(self, bank: Tensor, settings: Settings, team: Team) -> None:
        self._pairs = settings.pairs
        self._summed = settings.channels == "all"
        self._preserve = settings.norm == "preserve"
        self._team = team
        self._shape = bank.shape
        self._fourier = Fourier(bank.shape[3:], bank.dtype, bank.device)
        whole = self._summed or bank.device.type != "cpu"
        self._blocks = [_Block(*block) for block in self._fourier.blocks(bank, whole=whole)]
        self._workspaces = threading.local()

        zeros = bank.new_zeros(bank.shape[0], 1, bank.shape[1])  # [G, 1, M], as all that is kept per filter
        self._distance = 0.0  # how far down their directions the filters stand
        self._norms = zeros + 1  # of the filters; where preserved 1 up to rounding, which must not add up
        self._speed = zeros  # squared norms of the directions
        self._radial = zeros  # what is taken from the gradients along the filters: nearly all there is
        self._pull, self._steepness, self._climb, self._overlap = zeros, zeros, zeros, 0.0  # see `arrive`
        self._radial_before, self._climb_before, self._energy = zeros, zeros, math.inf  # of the gradient before

    def bank(self) -> Tensor:
        """The weights where they stand, ``[G, M, C, *kernel_size]``."""
        blocks = [(block.groups, block.channels, block.weights.whole) for block in self._blocks]
        return self._fourier.bank(blocks, self._shape)

    def arrive(self, distance: float) -> float:
        """Move to ``distance`` down the direction from where `aim` looked along it.

        Returns:
            Raw Convolutional Similarity there, or infinity where rounding has broken the norms. Its gradient is kept
            for `aim`.
        """
        moving = distance != self._distance
        old, new = self._stretch(self._distance), self._stretch(distance)  # [G, 1, M]
        keep, add = old / (new * self._norms), (self._distance - distance) / new

        def work(block: _Block) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
            weights, gradient, here = block.weights.whole, block.gradient.whole, self._workspace(block)
            if moving:
                weights.mul_(keep[block.groups]).addcmul_(block.ascent.whole, add[block.groups])
            self._fourier.forward(block.weights, out=here.spectrum)
            power = here.power.of(here.spectrum, here.spectrum)  # [F, g, c, M]
            partners = partner_power(power, self._pairs, out=here.partners.whole)
            pull = power.mul_(partners).sum((0, 2))  # half of what the gradient has along the filter
            here.spectrum.first.mul_(partners)
            here.spectrum.second.mul_(here.partners.rest)
            self._fourier.twice_adjoint(here.spectrum, out=block.gradient)
            if self._preserve:
                gradient.addcmul_(weights, self._radial[block.groups], value=-1)
            steepness, squares = here.inner(gradient, gradient), here.inner(weights, weights)
            climb = here.inner(gradient, block.ascent.whole)
            return pull, steepness, climb, squares, _dot(gradient, block.previous.whole)

        pulls, steepness, climb, squares, overlaps = zip(*self._team.map(work, self._blocks), strict=True)
        self._pull, self._steepness, self._climb = map(self._gather, (pulls, steepness, climb))
        self._overlap, self._distance = sum(overlaps), distance
        if self._preserve:
            self._norms = nonzero(self._gather(squares).sqrt())
            if float((self._norms - 1).abs().max()) > TRUSTED:
                return math.inf
        return _total(self._pull) / 2

    def aim(self) -> float:
        """Choose the conjugate direction (Polak-Ribière) and return the distance to the lowest loss along it."""
        # Of the gradient, what is still along the filters; of the direction, what moving has turned along them.
        along = 2 * self._pull / self._norms.square() if self._preserve else self._radial  # [G, 1, M], as all of these
        radial = along - self._radial
        tilt = self._distance * self._speed / self._stretch(self._distance) if self._preserve else radial
        steepness = (self._steepness - radial.square()).clamp(min=0)
        climb = self._climb + tilt * radial
        before = (self._radial_before - self._distance * self._climb_before) / self._stretch(self._distance)
        energy, overlap = _total(steepness), self._overlap - _total(radial * before)
        rounding = (ROUNDING * torch.finfo(along.dtype).eps) ** 2 * _total(along.square())
        if energy <= rounding:
            return 0.0
        beta = max(0.0, (energy - overlap) / self._energy)
        turned = self._preserve and self._distance**2 * float(self._speed.max()) > FAR
        if turned or energy + beta * _total(climb) <= 0:
            beta = 0.0
        lean = beta * tilt - radial
        # What the squared norm of the new direction comes to, up to rounding; it is measured while it is turned.
        speed = (steepness + 2 * beta * climb + beta**2 * (self._speed - tilt.square())).clamp(min=0)

        def work(block: _Block) -> tuple[Tensor, list[float]]:
            ascent = block.ascent.whole
            torch.add(block.gradient.whole, ascent, alpha=beta, out=ascent)
            if self._preserve:
                ascent.addcmul_(block.weights.whole, lean[block.groups])
            block.previous, block.gradient = block.gradient, block.previous
            here = self._workspace(block)
            return here.inner(ascent, ascent), self._look(block, here, speed[block.groups])

        speeds, looks = zip(*self._team.map(work, self._blocks), strict=True)
        self._speed, self._energy, self._distance = self._gather(speeds), energy, 0.0
        self._radial, self._radial_before, self._climb_before = along, radial, steepness + beta * climb
        if _total(self._speed) <= rounding:  # the energy, a difference, may be more than there is to follow
            return 0.0
        # Where the expansion falls for ever, turn the fastest filter by an eighth and see.
        fastest = float(self._speed.max())
        coefficients = [sum(parts) for parts in zip(*looks, strict=True)]
        return _lowest(*coefficients, otherwise=1 / math.sqrt(fastest)) if fastest else 0.0

    def _look(self, block: _Block, here: _Workspace, speed: Tensor) -> list[float]:
        """Coefficients of the distance t, its square, cube and fourth power in the loss down the direction.

        The power is ``P - 2 t P1 + t^2 P2`` there, up to the third order in t where norms are preserved. Seen on the
        coarse lattice, where correlations wrap around, the lowest loss lies at nearly the same distance.
        """
        weights, ascent = block.weights, block.ascent
        if not self._fourier.coarse_is_free:
            self._fourier.coarse_forward(weights, out=here.coarse_weights)
            self._fourier.coarse_forward(ascent, out=here.coarse_ascent)
            weights, ascent = here.coarse_weights, here.coarse_ascent
        power, power1 = here.coarse_power.of(weights, weights), here.coarse_power1.of(weights, ascent)  # [F, g, c, M]
        power2 = here.coarse_power2.of(ascent, ascent)
        if self._preserve:
            power2.addcmul_(power, speed, value=-1)
        partners = partner_power(power1, self._pairs, out=here.coarse_partners.whole)
        first, second = -2 * _dot(power, partners), 2 * _dot(power1, partners)
        partners = partner_power(power2, self._pairs, out=here.coarse_partners.whole)
        second += _dot(power, partners)
        return [first, second, -2 * _dot(power1, partners), _dot(power2, partners) / 2]

    def _stretch(self, distance: float) -> Tensor:
        """What filters that went ``distance`` along the tangent are divided by to be of unit norm, ``[G, 1, M]``."""
        return (1 + distance**2 * self._speed).sqrt() if self._preserve else torch.ones_like(self._speed)

    def _gather(self, parts: Iterable[Tensor]) -> Tensor:
        """Sum over blocks of values per filter ``[g, M]``, always in the same order."""
        total = torch.zeros_like(self._speed)  # [G, 1, M]
        for block, part in zip(self._blocks, parts, strict=True):
            total[block.groups, 0] += part
        return total

    def _workspace(self, block: _Block) -> _Workspace:
        """Memory of the thread's own for blocks of this shape: to allocate it anew costs page faults."""
        workspace: _Workspace | None = getattr(self._workspaces, block.shape, None)
        if workspace is None:
            workspace = _Workspace(block.weights.whole, self._fourier, summed=self._summed)
            setattr(self._workspaces, block.shape, workspace)
        return workspace


class _Block:
    """Some groups, or some channels of one, with what the conjugate gradients keep of them; each ``[T, g, c, M]``."""

    def __init__(self, groups: slice, channels: slice, weights: Tensor) -> None:
        self.groups, self.channels = groups, channels
        self.shape = "x".join(map(str, weights.shape))
        self.weights = Halves(weights)
        self.ascent, self.gradient, self.previous = (Halves(torch.zeros_like(weights)) for _ in range(3))


class _Power:
    """Memory for power ``[F, g, c, M]``.

    Args:
        whole: The memory.
        weights: Factor on the first row, the constant: its Parseval weight, relative to the others.
        summed: Whether power is summed over channels.
    """

    def __init__(self, whole: Tensor, *, constant: float = 1.0, summed: bool = False) -> None:
        self.whole, self.rest, self._first = whole, whole[1:], whole[0]
        self._constant, self._summed = constant, summed

    def of(self, a: Halves, b: Halves) -> Tensor:
        """Real part of the cross-power of two spectra."""
        torch.mul(a.first, b.first, out=self.whole)
        self.rest.addcmul_(a.second, b.second)
        if self._constant != 1:
            self._first.mul_(self._constant)
        return self.whole.sum(2, keepdim=True) if self._summed else self.whole


class _Workspace:
    """Scratch memory for blocks of one shape."""

    def __init__(self, weights: Tensor, fourier: Fourier, *, summed: bool) -> None:
        _, groups, channels, filters = weights.shape
        frequencies, coarse = fourier.points // 2 + 1, fourier.coarse_points // 2 + 1
        constant = math.sqrt(2) if fourier.coarse_is_free else 1.0

        def memory(rows: int, *, by_channel: bool = True) -> Tensor:
            return weights.new_empty(rows, groups, channels if by_channel else 1, filters)

        self.spectrum = Halves(memory(fourier.points))
        self.power = _Power(memory(frequencies), summed=summed)
        self.partners = _Power(memory(frequencies, by_channel=not summed))
        self.coarse_power, self.coarse_power1, self.coarse_power2 = (
            _Power(memory(coarse), constant=constant, summed=summed) for _ in range(3)
        )
        self.coarse_partners = _Power(memory(coarse, by_channel=not summed))
        if not fourier.coarse_is_free:
            self.coarse_weights, self.coarse_ascent = (Halves(memory(fourier.coarse_points)) for _ in range(2))
        self._product = torch.empty_like(weights)

    def inner(self, a: Tensor, b: Tensor) -> Tensor:
        """Inner products ``[g, M]`` of the filters' parts ``[T, g, c, M]``."""
        return torch.mul(a, b, out=self._product).sum((0, 2))


def _total(values: Tensor) -> float:
    return float(values.cpu().double().sum())


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.flatten(), b.flatten()))


def _lowest(first: float, second: float, third: float, fourth: float, *, otherwise: float) -> float:
    """The least positive distance at which the quartic with these coefficients stops falling."""
    slope = [4 * fourth, 3 * third, 2 * second, first]
    if not all(map(math.isfinite, slope)):
        return otherwise
    roots = np.roots(slope)
    rises = roots.real[(np.abs(roots.imag) <= 1e-9 * np.abs(roots)) & (roots.real > 0)]
    return float(rises.min()) if len(rises) else otherwise
