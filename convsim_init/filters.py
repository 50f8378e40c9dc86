"""The filters of one layer on their way down: the arithmetic of a conjugate-gradient step.

The layer is cut into blocks ``[T, g, c, M]`` (T taps a kernel, g groups, c input channels, M filters) that fit a core's
cache. Taps stand in parity coordinates: the sums and the differences of taps opposite each other about the kernel's
centre. That rotation keeps norms and halves the Fourier transform: cosines see only the sums, sines the differences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from convsim_init.settings import Settings
from convsim_init.similarity import nonzero, partner_power, power_spectrum, real_fourier_basis

KERNELS_PER_BLOCK = 32768


class Filters:
    """A layer's filters, and the state of the conjugate gradients that move them.

    Args:
        bank: ``[G, M, C, *kernel_size]``; where norms are preserved, of unit filters (or filters that are zero).
        settings: Which similarity is lowered, and whether norms are preserved.
    """

    def __init__(self, bank: Tensor, settings: Settings) -> None:
        self._settings = settings
        self._preserve = settings.norm == "preserve"
        self._shape = bank.shape
        taps = math.prod(bank.shape[3:])
        self._rotation = _parity_rotation(taps).to(bank)  # [T, T]
        basis = real_fourier_basis(bank.shape[3:], bank.dtype, bank.device) @ self._rotation.T  # [N, T]
        frequencies, sums = basis.shape[0] // 2 + 1, (taps + 1) // 2
        self._cosines = basis[:frequencies, :sums].contiguous()
        self._sines = basis[frequencies:, sums:].contiguous()
        self._twice_cosines, self._twice_sines = 2 * self._cosines.T, 2 * self._sines.T
        self._buffers: dict[str, Tensor] = {}
        self._blocks = list(self._cut(bank.reshape(*bank.shape[:3], taps)))
        self._pull = bank.new_zeros(bank.shape[0], 1, bank.shape[1])  # [G, 1, M]: half of the radial gradients
        self._speed = torch.zeros_like(self._pull)  # [G, 1, M]: squared norms of the directions
        self._distance = 0.0  # how far along the directions the filters stand
        self._stretch = torch.ones_like(self._pull)  # [G, 1, M]: what they were divided by there, to be of unit norm
        self._energy = math.inf  # squared norm of the previous gradient

    def bank(self) -> Tensor:
        """The weights where they stand, ``[G, M, C, *kernel_size]``."""
        bank = self._pull.new_empty(*self._shape[:3], self._rotation.shape[0])  # [G, M, C, T]
        for block in self._blocks:
            bank[block.groups, :, block.channels] = torch.einsum("pgcm,pt->gmct", block.weights, self._rotation)
        return bank.reshape(self._shape)

    def evaluate(self) -> float:
        """Raw Convolutional Similarity where the weights stand; keeps its gradient for `aim`."""
        self._pull.zero_()
        for block in self._blocks:
            spectrum = self._transform(block.weights, "here")  # [N, g, c, M]
            power = self._power(spectrum, "power")  # [F, g, c, M]
            partners = self._partners(power, "partners")
            self._pull[block.groups] += power.mul_(partners).sum((0, 2))[:, None]
            spectrum[: len(partners)] *= partners
            spectrum[len(partners) :] *= partners[1:]
            self._adjoint(spectrum, out=block.gradient)
        return float(self._pull.double().sum()) / 2

    def aim(self) -> float:
        """Choose the conjugate direction (Polak-Ribière) and return the distance to the lowest loss along it."""
        energy = overlap = 0.0
        for block in self._blocks:
            if self._preserve:
                block.gradient.addcmul_(block.weights, self._pull[block.groups], value=-2)
            energy += _dot(block.gradient, block.gradient)
            overlap += _dot(block.gradient, block.previous)
        if energy == 0:
            return 0.0
        slope = self._turn(max(0.0, (energy - overlap) / self._energy))
        if slope >= 0:
            slope = self._turn(0.0)
        self._energy, self._distance = energy, 0.0
        self._stretch = torch.ones_like(self._stretch)
        for block in self._blocks:
            block.previous, block.gradient = block.gradient, block.previous
        # Beyond an eighth of a turn the expansion along the great circle says little.
        reach = 1 / math.sqrt(float(self._speed.max())) if self._preserve else math.inf
        return _lowest(slope, *self._curvature(), reach=reach)

    def move(self, distance: float) -> None:
        """Put the weights at ``distance`` along the direction from where `aim` found them."""
        squares = torch.zeros_like(self._speed)
        for block in self._blocks:
            block.weights.mul_(self._stretch[block.groups]).add_(block.direction, alpha=distance - self._distance)
            squares[block.groups] += block.weights.square().sum((0, 2))[:, None]
        self._distance = distance
        if self._preserve:
            self._stretch = nonzero(squares.sqrt())
            for block in self._blocks:
                block.weights /= self._stretch[block.groups]

    def _turn(self, beta: float) -> float:
        """Let the direction be ``beta`` times the old one, made tangent here, less the gradient; return the slope."""
        tilt = beta * self._distance * self._speed / self._stretch
        slope = 0.0
        self._speed = torch.zeros_like(self._speed)
        for block in self._blocks:
            block.direction.mul_(beta)
            if self._preserve and beta:
                block.direction.addcmul_(block.weights, tilt[block.groups], value=-1)
            block.direction -= block.gradient
            self._speed[block.groups] += block.direction.square().sum((0, 2))[:, None]
            slope += _dot(block.direction, block.gradient)
        return slope

    def _curvature(self) -> tuple[float, float, float]:
        """Coefficients of the distance's second, third and fourth power in the loss along the direction.

        Power along it is ``P + 2 t P1 + t^2 P2``, up to the third order in t where norms are preserved.
        """
        second = third = fourth = 0.0
        for block in self._blocks:
            here, ahead = self._transform(block.weights, "here"), self._transform(block.direction, "ahead")
            power = self._power(here, "power")  # [F, g, c, M]
            power1 = self._power(here, "power1", ahead)
            power2 = self._power(ahead, "power2")
            if self._preserve:
                power2.addcmul_(power, self._speed[block.groups], value=-1)
            partners = self._partners(power1, "partners")
            second += 2 * _dot(power1, partners)
            partners = self._partners(power2, "partners")
            second += _dot(power, partners)
            third += 2 * _dot(power1, partners)
            fourth += _dot(power2, partners) / 2
        return second, third, fourth

    def _transform(self, taps: Tensor, name: str) -> Tensor:
        """Fourier coefficients ``[N, g, c, M]`` of ``[T, g, c, M]``."""
        frequencies, sums = self._cosines.shape
        spectrum = self._scratch(name, frequencies + len(self._sines), taps)
        torch.mm(self._cosines, taps[:sums].flatten(1), out=spectrum[:frequencies].flatten(1))
        torch.mm(self._sines, taps[sums:].flatten(1), out=spectrum[frequencies:].flatten(1))
        return spectrum

    def _adjoint(self, spectrum: Tensor, out: Tensor) -> None:
        """Gradient ``[T, g, c, M]`` of half the squares of `_transform`'s coefficients, times two."""
        frequencies, sums = self._cosines.shape
        torch.mm(self._twice_cosines, spectrum[:frequencies].flatten(1), out=out[:sums].flatten(1))
        torch.mm(self._twice_sines, spectrum[frequencies:].flatten(1), out=out[sums:].flatten(1))

    def _power(self, spectrum: Tensor, name: str, other: Tensor | None = None) -> Tensor:
        out = self._scratch(name, len(self._cosines), spectrum)
        return power_spectrum(spectrum, self._settings.channels, other=other, out=out)

    def _partners(self, power: Tensor, name: str) -> Tensor:
        return partner_power(power, self._settings.pairs, out=self._scratch(name, len(power), power))

    def _scratch(self, name: str, rows: int, like: Tensor) -> Tensor:
        """Uninitialized ``[rows, *like.shape[1:]]`` in a buffer kept under that name: allocating costs page faults."""
        size = rows * like[0].numel()
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = like.new_empty(size)
        return self._buffers[name][:size].view(rows, *like.shape[1:])

    def _cut(self, bank: Tensor) -> Iterator[_Block]:
        groups, filters, channels, _ = bank.shape
        whole = self._settings.channels == "all" or bank.device.type != "cpu"
        room = bank.numel() if whole else max(1, KERNELS_PER_BLOCK // filters)
        if room >= channels:
            step = room // channels
            parts = [(slice(g, g + step), slice(None)) for g in range(0, groups, step)]
        else:
            parts = [(slice(g, g + 1), slice(c, c + room)) for g in range(groups) for c in range(0, channels, room)]
        for part in parts:
            yield _Block(*part, torch.einsum("pt,gmct->pgcm", self._rotation, bank[part[0], :, part[1]]))


class _Block:
    """Some groups, or some channels of one, with what the conjugate gradients keep of them; each ``[T, g, c, M]``."""

    def __init__(self, groups: slice, channels: slice, weights: Tensor) -> None:
        self.groups, self.channels = groups, channels
        self.weights = weights.contiguous()
        self.direction = torch.zeros_like(self.weights)
        self.gradient = torch.zeros_like(self.weights)
        self.previous = torch.zeros_like(self.weights)


def _parity_rotation(taps: int) -> Tensor:
    """Orthogonal ``[T, T]``: sums of opposite taps (the middle one alone), then their differences."""
    identity = torch.eye(taps, dtype=torch.float64, device="cpu")
    half = taps // 2
    ahead, behind = identity[:half], identity.flip(0)[:half]
    return torch.cat([(ahead + behind) / 2**0.5, identity[half : taps - half], (ahead - behind) / 2**0.5])


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.flatten(), b.flatten()))


def _lowest(first: float, second: float, third: float, fourth: float, *, reach: float) -> float:
    """The least positive distance at which the quartic with these coefficients stops falling, or ``reach``."""
    slope = [4 * fourth, 3 * third, 2 * second, first]
    if not all(map(math.isfinite, slope)):
        return reach
    roots = np.roots(slope)
    rises = roots.real[(np.abs(roots.imag) <= 1e-9 * np.abs(roots)) & (roots.real > 0)]
    return float(rises.min()) if len(rises) else reach
