"""The arithmetic of a conjugate-gradient step on a block of a layer, in few operations of torch's.

`compiled.py` does the same in one pass, where the package was built with a C compiler.
"""

from __future__ import annotations

import threading
from typing import Protocol

import torch
from torch import Tensor

from convsim_init.functional.fourier import CACHED, Fourier, Halves
from convsim_init.functional.similarity import partner_power
from convsim_init.settings import Settings


class Block(Protocol):
    """Some groups of a layer, or some channels of one, with what the conjugate gradients keep of them."""

    groups: slice
    channels: slice

    @property
    def weights(self) -> Tensor:
        """Where they stand, ``[T, g, c, M]`` in the coordinates of `Fourier`."""

    def arrive(self, keep: Tensor, add: Tensor, taken: Tensor) -> tuple[Tensor, float]:
        """Move to ``keep * weights + add * ascent``, and take the gradient there, less ``taken * weights``.

        Args:
            keep: Per filter, ``[g, 1, M]``.
            add: Likewise.
            taken: Likewise.

        Returns:
            Sums per filter ``[4, g, M]``: inner products of this gradient with the weights, itself and the ascent, and
            the squared norms of the weights; and the inner product of the whole gradient with the one before, at the
            first arrival after `aim`. They last until the next call.
        """

    def aim(self, beta: float, lean: Tensor, slow: Tensor) -> Tensor:
        """Turn the ascent to ``gradient + beta * ascent + lean * weights``, and look along it.

        The power at distance t down the ascent is ``P0 - 2 t P1 + t^2 P2``, with ``slow * P0`` added to P2. It is seen
        on the coarse lattice, where correlations wrap around: the lowest loss lies at nearly the same distance.

        Returns:
            How much of the loss comes from each two of these terms, ``[3, 3]``; above the diagonal at least. It lasts
            until the next call.
        """


class TorchBlock:
    """A block on any device, of any dtype, for all settings; blocks of a layer share ``memory``."""

    MOST = CACHED  # weights: each operation passes over all of them

    def __init__(
        self,
        groups: slice,
        channels: slice,
        weights: Tensor,
        fourier: Fourier,
        settings: Settings,
        memory: threading.local,
    ) -> None:
        self.groups, self.channels = groups, channels
        self._memory = memory
        self._fourier, self._pairs, self._summed = fourier, settings.pairs, settings.channels == "all"
        self._weights = Halves(weights)
        self._ascent, self._gradient, self._previous = (Halves(torch.zeros_like(weights)) for _ in range(3))

    @property
    def weights(self) -> Tensor:
        """As `Block.weights`."""
        return self._weights.whole

    def arrive(self, keep: Tensor, add: Tensor, taken: Tensor) -> tuple[Tensor, float]:
        """As `Block.arrive`."""
        weights, ascent, gradient = self._weights.whole, self._ascent.whole, self._gradient.whole
        here = self._workspace()
        weights.mul_(keep).addcmul_(ascent, add)
        self._fourier.full.forward(self._weights, out=here.spectrum)
        lift = self._fourier.identity * taken / 2  # [F, g, 1, M]: taken among the partners, where it costs nothing
        power = here.lifted_power(lift)  # [F, g, c, M]
        lifts = partner_power(lift, self._pairs) + lift
        if self._pairs == "all":  # then these are equal for all filters
            partners = torch.sub(power.sum(-1, keepdim=True) - lifts[..., :1], power, out=power)
        else:
            partners = partner_power(power, self._pairs).sub_(lifts)
        here.spectrum.first.mul_(partners)
        here.spectrum.second.mul_(partners[1:])
        self._fourier.full.twice_adjoint(here.spectrum, out=self._gradient)
        pairs = ((gradient, weights), (gradient, gradient), (gradient, ascent), (weights, weights))
        sums = torch.stack([here.inner(a, b) for a, b in pairs])
        return sums, float(torch.dot(self._gradient.flat, self._previous.flat))

    def aim(self, beta: float, lean: Tensor, slow: Tensor) -> Tensor:
        """As `Block.aim`."""
        weights, ascent, here = self._weights, self._ascent, self._workspace()
        torch.add(self._gradient.whole, ascent.whole, alpha=beta, out=ascent.whole).addcmul_(weights.whole, lean)
        self._previous, self._gradient = self._gradient, self._previous
        if not self._fourier.coarse_is_free:
            self._fourier.coarse.forward(weights, out=here.coarse_weights)
            self._fourier.coarse.forward(ascent, out=here.coarse_ascent)
            weights, ascent = here.coarse_weights, here.coarse_ascent
        powers = here.expansion  # [3, F, g, c, M]
        for power, a, b in ((powers[0], weights, weights), (powers[1], weights, ascent), (powers[2], ascent, ascent)):
            torch.mul(a.first, b.first, out=power)
            power[1:].addcmul_(a.second, b.second)
        powers[2].addcmul_(powers[0], slow)
        powers[:, 0] *= self._fourier.coarse_constant
        if self._summed:
            powers = powers.sum(3, keepdim=True)
        if self._pairs == "all":
            sums = powers.sum(-1).flatten(1)
            return sums @ sums.T - powers.flatten(1) @ powers.flatten(1).T
        return powers.flatten(1) @ partner_power(powers, self._pairs).flatten(1).T

    def _workspace(self) -> _Workspace:
        """Memory of the thread's own for blocks of this shape: to allocate it anew costs page faults."""
        shape = "x".join(map(str, self._weights.whole.shape))
        workspace: _Workspace | None = getattr(self._memory, shape, None)
        if workspace is None:
            workspace = _Workspace(self._weights.whole, self._fourier, self._summed)
            setattr(self._memory, shape, workspace)
        return workspace


class _Workspace:
    """Scratch memory for blocks of one shape. What is not needed at the same time lies at the same place."""

    def __init__(self, weights: Tensor, fourier: Fourier, summed: bool) -> None:
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
