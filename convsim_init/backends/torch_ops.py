"""The conjugate-gradient step and the regularizer in torch's operations: any device, dtype and coupling.

`compiled.py` does the same in one pass over the weights, for the default settings on the CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from convsim_init.functional.bank import count_pairs, nonzero
from convsim_init.functional.fourier import CACHED, Fourier, Halves, Part, cuts, real_fourier_basis
from convsim_init.functional.similarity import partner_power, power_spectrum, weights_at_once
from convsim_init.settings import Channels, Pairs, Settings


class TorchBlock:
    """A `Block` on any device, of any dtype, for all settings.

    It alone takes a mask: 1 for taps that are there and 0 for those that are zero and stay so, ``[T, g, c, M]``, in the
    order of the kernel and not in the coordinates of `Fourier`. The gradient is projected to those that are there:
    directions are then in that subspace too, and the filters never leave it.
    """

    max_weights = CACHED  # each operation passes over all of them

    def __init__(
        self,
        part: Part,
        weights: Tensor,
        fourier: Fourier,
        settings: Settings,
        memory: threading.local,
        *,
        mask: Tensor | None = None,
    ) -> None:
        self.part = part
        self._memory, self._mask = memory, mask
        self._fourier, self._pairs, self._channels = fourier, settings.pairs, settings.compared_channels
        self._weights = Halves(weights)
        self._direction, self._gradient, self._previous = (Halves(torch.zeros_like(weights)) for _ in range(3))

    @property
    def weights(self) -> Tensor:
        """As `Block.weights`."""
        return self._weights.whole

    def evaluate(self, keep: Tensor, add: Tensor, shift: Tensor) -> tuple[Tensor, float]:
        """As `Block.evaluate`."""
        weights, direction, gradient = self._weights.whole, self._direction.whole, self._gradient.whole
        here = self._workspace()
        weights.mul_(keep).addcmul_(direction, add)
        self._fourier.full.forward(self._weights, out=here.spectrum)
        power = power_spectrum(here.spectrum.whole, self._channels, out=here.power)  # [F, g, c, M]
        # Over all pairs Q P = S - P is elementwise and may replace P; else neighbours are read.
        partners = partner_power(power, self._pairs, out=power if self._pairs == "all" else None)
        # The shift is subtracted from the partners' power, before anything cancels. To a filter's own power, of which
        # it is M times as much, it must not be added: that would leave M times the rounding.
        partners.sub_(self._fourier.identity * shift / 2)
        here.spectrum.first.mul_(partners)
        here.spectrum.second.mul_(partners[1:])
        self._fourier.full.twice_adjoint(here.spectrum, out=self._gradient)
        if self._mask is not None:
            rotation, coordinates = self._fourier.rotation, gradient.flatten(1)
            taps = torch.mm(rotation.T, coordinates).mul_(self._mask.flatten(1))
            torch.mm(rotation, taps, out=coordinates)
        factors = ((gradient, weights), (gradient, gradient), (gradient, direction), (weights, weights))
        sums = torch.stack([here.inner(a, b) for a, b in factors])
        return sums, float(torch.dot(self._gradient.flat, self._previous.flat))

    def turn(self, beta: float, weight_coefficient: Tensor, curvature: Tensor) -> Tensor:
        """As `Block.turn`."""
        weights, direction, here = self._weights, self._direction, self._workspace()
        torch.add(self._gradient.whole, direction.whole, alpha=beta, out=direction.whole)
        direction.whole.addcmul_(weights.whole, weight_coefficient)
        # Exchanged, not copied: `evaluate` writes every entry of the new gradient.
        self._previous, self._gradient = self._gradient, self._previous
        if not self._fourier.coarse_is_free:
            self._fourier.coarse.forward(weights, out=here.coarse_weights)
            self._fourier.coarse.forward(direction, out=here.coarse_direction)
            weights, direction = here.coarse_weights, here.coarse_direction
        powers = here.expansion  # [3, F, g, c, M]
        factors = ((weights, weights), (weights, direction), (direction, direction))
        for power, (a, b) in zip(powers, factors, strict=True):
            torch.mul(a.first, b.first, out=power)
            power[1:].addcmul_(a.second, b.second)
        powers[2].addcmul_(powers[0], curvature)
        powers[:, 0] *= self._fourier.coarse_constant
        if self._channels == "all":
            powers = powers.sum(3, keepdim=True)
        if self._pairs == "all":  # <P_i, S_j - P_j> without a tensor of partners
            sums = powers.sum(-1).flatten(1)
            return sums @ sums.T - powers.flatten(1) @ powers.flatten(1).T
        return powers.flatten(1) @ partner_power(powers, self._pairs).flatten(1).T

    def _workspace(self) -> _Workspace:
        """Scratch memory of this thread for blocks of this shape: allocating it anew costs page faults."""
        shape = "x".join(map(str, self._weights.whole.shape))
        workspace: _Workspace | None = getattr(self._memory, shape, None)
        if workspace is None:
            workspace = _Workspace(self._weights.whole, self._fourier)
            setattr(self._memory, shape, workspace)
        return workspace


class _Workspace:
    """Scratch memory for blocks of one shape; arrays that are not needed at the same time share a place."""

    def __init__(self, weights: Tensor, fourier: Fourier) -> None:
        taps, *rest = weights.shape
        frequencies, coarse = fourier.points // 2 + 1, fourier.coarse_points // 2 + 1
        self.power = weights.new_empty(frequencies, *rest)
        # There are F >= T rows: prod(2 k - 1) + 1 >= 2 prod(k). `inner` comes once P is used up.
        self._product = self.power[:taps]
        seen = 0 if fourier.coarse_is_free else fourier.coarse_points
        memory = weights.new_empty(max(fourier.points, 3 * coarse + 2 * seen), *rest)
        self.spectrum = Halves(memory[: fourier.points])
        self.expansion = memory[: 3 * coarse].view(3, coarse, *rest)
        self.coarse_weights = Halves(memory[3 * coarse : 3 * coarse + seen])
        self.coarse_direction = Halves(memory[3 * coarse + seen : 3 * coarse + 2 * seen])

    def inner(self, a: Tensor, b: Tensor) -> Tensor:
        """Inner products ``[g, M]`` of the filters' parts ``[T, g, c, M]``."""
        return torch.mul(a, b, out=self._product).sum((0, 2))


def value_and_gradient(
    kernels: Tensor, shape: Sequence[int], pairs: Pairs, channels: Channels, *, normalized: bool
) -> tuple[Tensor, Tensor]:
    """Convolutional Similarity of a layer and its gradient, in closed form; never waits for the device.

    The kernels ``[G M C, T]`` are those of a bank of that shape, ``[G, M, C, *kernel_size]``, float32 or float64.
    """
    if not normalized:
        return _raw(kernels, shape, pairs, channels)
    # With u = w / |w|: dCS/dw = (g - <g, u> u) / |w|, g = dCS/du. Divided by its largest entry first, a
    # filter's squares neither vanish nor overflow.
    filters = kernels.view(*shape[:2], -1)  # [G, M, C T]
    largest = nonzero(filters.abs().amax(-1, keepdim=True))  # [G, M, 1]
    scaled = filters / largest
    norms = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    active = count_pairs(norms[..., 0] > 0, pairs).clamp(min=1)
    unit = scaled / nonzero(norms)
    value, gradient = _raw(unit.view_as(kernels), shape, pairs, channels)
    gradient = gradient.view_as(unit)
    gradient.addcmul_(unit, torch.linalg.vecdot(gradient, unit)[..., None], value=-1)
    # One after the other: their product, the filter's norm, may be out of the range of float32.
    gradient.div_(nonzero(norms) * active).div_(largest)
    return value / active, gradient.view_as(kernels)


def _raw(kernels: Tensor, shape: Sequence[int], pairs: Pairs, channels: Channels) -> tuple[Tensor, Tensor]:
    """Raw similarity of kernels ``[G M C, T]`` and its gradient."""
    basis = real_fourier_basis(shape[3:], kernels.dtype, kernels.device)  # [N, T]
    bank = kernels.view(*shape[:3], -1)
    max_weights = weights_at_once(bank, channels, CACHED)
    if max_weights >= bank.numel():
        value, gradients = _raw_block(bank, basis, pairs, channels)
        return value, gradients.view_as(kernels)
    values, gradients = list[Tensor](), torch.empty_like(bank)
    for part in cuts(shape, max_weights):
        value, gradients[part] = _raw_block(bank[part], basis, pairs, channels)
        values.append(value)
    return torch.stack(values).sum(), gradients.view_as(kernels)


def _raw_block(bank: Tensor, basis: Tensor, pairs: Pairs, channels: Channels) -> tuple[Tensor, Tensor]:
    """What some channels ``[g, M, c, T]`` contribute, and its gradient: CS = <P, Q P> / 2, dCS/dx = 2 Q P x."""
    spectrum = torch.mm(basis, bank.reshape(-1, bank.shape[-1]).T).view(-1, *bank.shape[:3])  # [N, g, M, c]
    power = power_spectrum(spectrum.mT, channels)  # [F, g, c, M]
    partners = partner_power(power, pairs)
    value = torch.sum(power * partners) / 2
    spectrum[: len(power)].mul_(partners.mT)
    spectrum[len(power) :].mul_(partners[1:].mT)
    # With beta = 0 the first argument is not read: basis[0] only has a shape that fits.
    gradient = torch.addmm(basis[0], spectrum.flatten(1).T, basis, beta=0, alpha=2)  # in one launch
    return value, gradient.view(bank.shape)
