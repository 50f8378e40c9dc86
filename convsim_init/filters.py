"""The filters of one layer on their way down: the arithmetic of a conjugate-gradient step.

A layer is cut into blocks ``[T, g, c, M]`` (T taps a kernel, g groups, c input channels, M filters), and a step passes
over each block twice: `Filters.arrive` moves the weights and takes the gradient there, `Filters.aim` turns the
direction and looks along it. Between the passes only sums per filter are exchanged, ``[G, 1, M]`` in float64.

What a block's size and the number of operations on it come to decides how long a step takes: the arithmetic itself
waits for the memory.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convsim_init.fourier import Fourier, Halves
from convsim_init.parallel import Team
from convsim_init.settings import Settings
from convsim_init.similarity import partner_power

TRUSTED = 1e-3  # the norms of unit filters deviate by rounding only; by more, the loss is not that of unit filters
FAR = 1.0  # squared tangent of the angle, 45 degrees, beyond which a filter's old direction says nothing of the new
ROUNDING = 8  # a gradient so many units of rounding long, next to what was taken from it, holds nothing else

PerFilter: TypeAlias = NDArray[np.float64]  # [G, 1, M]


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
        self._shape, self._like = bank.shape, bank.new_empty(0)
        self._fourier = Fourier(bank.shape[3:], bank.dtype, bank.device)
        whole = self._summed or bank.device.type != "cpu"
        self._blocks = [_Block(*block) for block in self._fourier.blocks(bank, whole=whole)]
        self._workspaces = threading.local()

        zeros = np.zeros((bank.shape[0], 1, bank.shape[1]))
        self._distance = 0.0  # how far down their directions the filters stand
        self._norms = zeros + 1  # of the filters; where preserved 1 up to rounding, which must not add up
        self._speed = zeros  # squared norms of the directions
        self._taken = zeros  # what is taken from the gradients along the filters in advance: nearly all there is
        # Of the gradient what is left along the filters, its squared norms, and how far it goes along the directions.
        self._radial, self._steepness, self._climb, self._overlap = zeros, zeros, zeros, 0.0
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
        old, new = self._stretch(self._distance), self._stretch(distance)
        keep, add = self._tensor(old / (new * self._norms)), self._tensor((self._distance - distance) / new)
        lift = self._fourier.identity * self._tensor(self._taken / 2)  # [F, G, 1, M]: partners that take it away
        lifts = partner_power(lift, self._pairs).add_(lift)
        if self._pairs == "all":
            lifts = lifts[..., :1]

        def work(block: _Block) -> tuple[Tensor, float]:
            weights, gradient, here = block.weights.whole, block.gradient.whole, self._workspace(block)
            if moving:
                weights.mul_(keep[block.groups]).addcmul_(block.ascent.whole, add[block.groups])
            self._fourier.forward(block.weights, out=here.spectrum)
            power = here.lifted_power(lift[:, block.groups])  # [F, g, c, M]
            if self._pairs == "all":
                partners = torch.sub(power.sum(-1, keepdim=True).sub_(lifts[:, block.groups]), power, out=power)
            else:
                partners = partner_power(power, self._pairs).sub_(lifts[:, block.groups])
            here.spectrum.first.mul_(partners)
            here.spectrum.second.mul_(partners[1:])
            self._fourier.twice_adjoint(here.spectrum, out=block.gradient)
            sums = [here.inner(gradient, other) for other in (weights, gradient, block.ascent.whole)]
            sums.append(here.inner(weights, weights))
            return torch.stack(sums), float(torch.dot(block.gradient.flat, block.previous.flat))

        sums, overlaps = zip(*self._team.map(work, self._blocks), strict=True)
        left, self._steepness, self._climb, squares = self._gather(sums)
        self._overlap, self._distance = sum(overlaps), distance
        if self._preserve:
            self._norms = np.where(squares > 0, np.sqrt(squares), 1)
            self._radial = left / self._norms**2
            if not np.abs(self._norms - 1).max() <= TRUSTED:
                return math.inf
        return float((left + self._taken * squares).sum()) / 4

    def aim(self) -> float:
        """Choose the conjugate direction (Polak-Ribière) and return the distance to the lowest loss along it."""
        # Of the gradient, what is still along the filters; of the direction, what moving has turned along them.
        along, radial = self._taken + self._radial, self._radial
        tilt = self._distance * self._speed / self._stretch(self._distance) if self._preserve else radial
        steepness = (self._steepness - radial**2).clip(min=0)
        climb = self._climb + tilt * radial
        before = (self._radial_before - self._distance * self._climb_before) / self._stretch(self._distance)
        energy, overlap = float(steepness.sum()), self._overlap - float((radial * before).sum())
        rounding = (ROUNDING * torch.finfo(self._like.dtype).eps) ** 2 * float((along**2).sum())
        if energy <= rounding:
            return 0.0
        beta = max(0.0, (energy - overlap) / self._energy)
        turned = self._preserve and self._distance**2 * float(self._speed.max()) > FAR
        if turned or energy + beta * float(climb.sum()) <= 0:
            beta = 0.0
        speed = (steepness + 2 * beta * climb + beta**2 * (self._speed - tilt**2)).clip(min=0)
        lean, slow = self._tensor(beta * tilt - radial), self._tensor(-speed)

        def work(block: _Block) -> Tensor:
            ascent = block.ascent.whole
            torch.add(block.gradient.whole, ascent, alpha=beta, out=ascent)
            if self._preserve:
                ascent.addcmul_(block.weights.whole, lean[block.groups])
            block.previous, block.gradient = block.gradient, block.previous
            return self._look(block, self._workspace(block), slow[block.groups])

        looks = sum(part.double() for part in self._team.map(work, self._blocks))
        self._speed, self._energy, self._distance = speed, energy, 0.0
        self._taken, self._radial_before, self._climb_before = along, radial, steepness + beta * climb
        if float(speed.sum()) <= rounding:  # the energy, a difference, may be more than there is to follow
            return 0.0
        # Where the expansion falls for ever, turn the fastest filter by an eighth and see.
        fastest = float(speed.max())
        return _lowest(looks, otherwise=1 / math.sqrt(fastest)) if fastest else 0.0

    def _look(self, block: _Block, here: _Workspace, slow: Tensor) -> Tensor:
        """How the power's expansion down the direction is coupled with itself, ``[3, 3]``.

        The power at distance t is ``P - 2 t P1 + t^2 P2``, up to the third order in t where norms are preserved. Seen
        on the coarse lattice, where correlations wrap around, the lowest loss lies at nearly the same distance.
        """
        weights, ascent = block.weights, block.ascent
        if not self._fourier.coarse_is_free:
            self._fourier.coarse_forward(weights, out=here.coarse_weights)
            self._fourier.coarse_forward(ascent, out=here.coarse_ascent)
            weights, ascent = here.coarse_weights, here.coarse_ascent
        powers = here.expansion  # [3, F, g, c, M]
        for power, a, b in ((powers[0], weights, weights), (powers[1], weights, ascent), (powers[2], ascent, ascent)):
            torch.mul(a.first, b.first, out=power)
            power[1:].addcmul_(a.second, b.second)
        if self._preserve:
            powers[2].addcmul_(powers[0], slow)
        if self._fourier.coarse_is_free:
            powers[:, 0] *= math.sqrt(2)  # the Parseval weight of the constant, relative to the others
        if self._summed:
            powers = powers.sum(3, keepdim=True)
        if self._pairs == "all":
            sums = powers.sum(-1).flatten(1)
            return sums @ sums.T - powers.flatten(1) @ powers.flatten(1).T
        return powers.flatten(1) @ partner_power(powers, self._pairs).flatten(1).T

    def _stretch(self, distance: float) -> PerFilter:
        """What filters that went ``distance`` along the tangent are divided by to be of unit norm."""
        return np.sqrt(1 + distance**2 * self._speed) if self._preserve else np.ones_like(self._speed)

    def _gather(self, parts: Sequence[Tensor]) -> NDArray[np.float64]:
        """Sums over blocks of several values per filter ``[n, g, M]``, always in the same order: ``[n, G, 1, M]``."""
        total = np.zeros((len(parts[0]), *self._speed.shape))
        for block, part in zip(self._blocks, parts, strict=True):
            total[:, block.groups, 0] += part.cpu().numpy()
        return total

    def _tensor(self, values: PerFilter) -> Tensor:
        return torch.from_numpy(values).to(self._like)

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


class _Workspace:
    """Scratch memory for blocks of one shape. What is not needed at the same time lies at the same place."""

    def __init__(self, weights: Tensor, fourier: Fourier, *, summed: bool) -> None:
        taps, *rest = weights.shape
        frequencies, coarse = fourier.points // 2 + 1, fourier.coarse_points // 2 + 1
        self._summed = summed

        power = weights.new_empty(frequencies, *rest)
        self._power, self._power_rest = power, power[1:]
        self._product = power[:taps]

        seen = 0 if fourier.coarse_is_free else fourier.coarse_points
        memory = weights.new_empty(max(fourier.points, 3 * coarse + 2 * seen), *rest)
        self.spectrum = Halves(memory[: fourier.points])
        self.expansion = memory[: 3 * coarse].view(3, coarse, *rest)
        if seen:
            self.coarse_weights = Halves(memory[3 * coarse : 3 * coarse + seen])
            self.coarse_ascent = Halves(memory[3 * coarse + seen : 3 * coarse + 2 * seen])

    def lifted_power(self, lift: Tensor) -> Tensor:
        """Power of the spectrum and ``lift`` ``[F, g, 1, M]``; where channels are summed, of all of them together."""
        first, second = self.spectrum.first, self.spectrum.second
        if self._summed:
            torch.mul(first, first, out=self._power)
        else:
            torch.addcmul(lift, first, first, out=self._power)
        self._power_rest.addcmul_(second, second)
        return self._power.sum(2, keepdim=True).add_(lift) if self._summed else self._power

    def inner(self, a: Tensor, b: Tensor) -> Tensor:
        """Inner products ``[g, M]`` of the filters' parts ``[T, g, c, M]``."""
        return torch.mul(a, b, out=self._product).sum((0, 2))


def _lowest(couplings: Any, *, otherwise: float) -> float:
    """The least positive distance at which the loss stops falling, given how the expansion's terms are coupled."""
    c = couplings.tolist()
    slope = [2 * c[2][2], -6 * c[1][2], 4 * c[1][1] + 2 * c[0][2], -2 * c[0][1]]
    if not all(map(math.isfinite, slope)):
        return otherwise
    roots = np.roots(slope)
    rises = roots.real[(np.abs(roots.imag) <= 1e-9 * np.abs(roots)) & (roots.real > 0)]
    return float(rises.min()) if len(rises) else otherwise
