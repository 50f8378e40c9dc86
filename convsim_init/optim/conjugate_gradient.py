"""The filters of one layer on their way down: the arithmetic of a conjugate-gradient step.

A layer is cut into blocks, and a step passes over each block twice: `Filters.arrive` moves the weights and takes the
gradient there, `Filters.aim` turns the direction and looks along it. Between the passes only sums per filter are
exchanged, ``[G, 1, M]`` in float64.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convsim_init.backends.compiled import CompiledBlock
from convsim_init.backends.torch_ops import Block, TorchBlock
from convsim_init.functional.fourier import Fourier
from convsim_init.optim.line_search import first_rise
from convsim_init.parallel.threads import Team
from convsim_init.settings import Settings

TRUSTED = 1e-3  # the norms of unit filters deviate by rounding only; by more, the loss is not that of unit filters
FAR = 1.01  # squared tangent of the angle, 45 degrees, beyond which a filter's old direction says nothing of the new
ROUNDING = 8  # a gradient so many units of rounding long, next to what was taken from it, holds nothing else

PerFilter: TypeAlias = NDArray[np.float64]  # [G, 1, M]


class Filters:
    """A layer's filters, and the state of the conjugate gradients that move them.

    Args:
        bank: ``[G, M, C, *kernel_size]``.
        scale: What the filters are divided by first, ``[G, M]``; where norms are preserved, their norms (1 for zero).
        settings: Which similarity is lowered, and whether norms are preserved.
        team: Who works on the blocks.
    """

    def __init__(self, bank: Tensor, scale: Tensor, settings: Settings, team: Team) -> None:
        self._preserve = settings.norm == "preserve"
        self._team = team
        self._shape, self._like = bank.shape, bank.new_empty(0)
        self._fourier = Fourier(bank.shape[3:], bank.dtype, bank.device)
        kind: type[CompiledBlock | TorchBlock] = CompiledBlock if CompiledBlock.fits(bank, settings) else TorchBlock
        whole, memory = settings.channels == "all" or bank.device.type != "cpu", threading.local()
        most = bank.numel() if whole else kind.MOST
        self._blocks: list[Block] = [
            kind(*block, self._fourier, settings, memory) for block in self._fourier.blocks(bank, scale, most)
        ]

        zeros = np.zeros((bank.shape[0], 1, bank.shape[1]))
        self._distance = 0.0  # how far down their directions the filters stand
        self._arrivals = 0  # since these directions were chosen
        self._norms = zeros + 1  # of the filters; where preserved 1 up to rounding, which must not add up
        self._speed = zeros  # squared norms of the directions
        self._taken = zeros  # what is taken from the gradients along the filters in advance: nearly all there is
        # Of the gradient what is left along the filters, its squared norms, and how far it goes along the directions.
        self._radial, self._steepness, self._climb, self._overlap = zeros, zeros, zeros, 0.0
        self._radial_before, self._climb_before, self._energy = zeros, zeros, math.inf  # of the gradient before

    def take_bank(self) -> Tensor:
        """The weights where they stand, ``[G, M, C, *kernel_size]``; what holds them is given up on the way."""

        def parts() -> Iterator[tuple[slice, slice, Tensor]]:
            while self._blocks:
                block = self._blocks.pop()
                yield block.groups, block.channels, block.weights

        return self._fourier.bank(parts(), self._shape)

    def arrive(self, distance: float) -> float:
        """Move to ``distance`` down the direction from where `aim` looked along it.

        Returns:
            Raw Convolutional Similarity there, or infinity where rounding has broken the norms. Its gradient is kept
            for `aim`.
        """
        old, new = self._stretch(self._distance), self._stretch(distance)
        keep, add = self._tensor(old / (new * self._norms)), self._tensor((self._distance - distance) / new)
        taken = self._tensor(self._taken)

        def work(block: Block) -> tuple[Tensor, float]:
            return block.arrive(keep[block.groups], add[block.groups], taken[block.groups])

        sums, overlaps = zip(*self._team.map(work, self._blocks), strict=True)
        left, self._steepness, self._climb, squares = self._gather(sums)
        self._overlap, self._distance = sum(overlaps), distance
        self._arrivals += 1
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
        if turned or self._arrivals > 1 or energy + beta * float(climb.sum()) <= 0:
            beta = 0.0  # also where the gradient before is not that of the step before
        speed = (steepness + 2 * beta * climb + beta**2 * (self._speed - tilt**2)).clip(min=0)
        lean, slow = self._tensor(beta * tilt - radial), self._tensor(-speed * self._preserve)

        def work(block: Block) -> Tensor:
            return block.aim(beta, lean[block.groups], slow[block.groups])

        # Backwards: what was seen last is still in the cache.
        looks = torch.stack(self._team.map(work, self._blocks[::-1])).sum(0, dtype=torch.float64)
        self._speed, self._energy, self._distance, self._arrivals = speed, energy, 0.0, 0
        self._taken, self._radial_before, self._climb_before = along, radial, steepness + beta * climb
        if float(speed.sum()) <= rounding:  # the energy, a difference, may be more than there is to follow
            return 0.0
        # Where the expansion falls for ever, turn the fastest filter by an eighth and see.
        fastest = float(speed.max())
        (_, p01, p02), (_, p11, p12), (_, _, p22) = looks.tolist()
        slope = -2 * p01, 4 * p11 + 2 * p02, -6 * p12, 2 * p22
        return first_rise(*slope, otherwise=1 / math.sqrt(fastest)) if fastest else 0.0

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
