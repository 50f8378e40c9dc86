"""Conjugate gradients on many layers of one shape at once, for accelerators: the host never waits within a step.

The same descent as `convsim_init.optim.descent` takes on one layer: what is a number there is a tensor with one value
per layer here, and what is a branch there is a choice between values. An iteration moves every layer to where it is
to try, judges what it found there, and gives those that go on from there their next direction. A layer whose loss is
not lower tries a quarter of the distance in the next iteration; one that has stopped stays where it is.
Letters: L layers, G groups, M filters of a group, C input channels, T taps, N lattice points, F frequencies. Vectors
are ``[T, L, G, C, M]``, values per filter ``[L, G, 1, M]``, values per layer ``[L, 1, 1, 1]``.

Tested on the CPU; it has not run on CUDA or MPS yet, which ``benchmarks/speed/gpu.py`` is there to measure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from convsim_init.functional.fourier import Fourier, Halves
from convsim_init.functional.similarity import count_pairs, filter_norms, nonzero, partner_power, per_filter
from convsim_init.optim.conjugate_gradient import FAR, ROUNDING, TRUSTED
from convsim_init.optim.descent import BACKTRACKS, IDLE_STEPS, NOTHING_LEFT, OFF_PLATEAU, PATIENCE, Descent, Stop
from convsim_init.optim.line_search import least_rise
from convsim_init.optim.replay import Replay
from convsim_init.settings import Settings

LOOK = 10  # iterations between two looks at which layers still move


@torch.no_grad()
def descend_stacks(
    stacks: Sequence[Sequence[Tensor]], settings: Settings, *, on_step: Callable[[], None] = lambda: None
) -> list[list[Descent]]:
    """Lower the Convolutional Similarity of stacks of filter banks, side by side, by conjugate gradients.

    What `convsim_init.optim.descent.descend` does to each bank, up to rounding.

    Args:
        stacks: Of each the banks ``[G, M, C, *kernel_size]``, all of one shape and dtype (float32 or float64); left as
            they are. All stacks are on one device.
        settings: What is lowered, and how, but for the optimizer.
        on_step: Called every few steps; what it raises ends the descent.

    Returns:
        How the descent of each bank went.
    """
    layers = [Stack(banks, settings) for banks in stacks]
    running = [(stack, Replay(stack.iterate, banks[0].device)) for stack, banks in zip(layers, stacks, strict=True)]
    try:
        while running:
            on_step()
            for _, replay in running:
                replay(LOOK)
            for _, replay in running:
                replay.wait()
            moving = torch.stack([stack.moving.any() for stack, _ in running]).tolist()
            running = [pair for pair, moves in zip(running, moving, strict=True) if moves]
    finally:
        for _, replay in running:  # what is still written to must not be given back
            replay.wait()
    return [stack.descents() for stack in layers]


def values_per_weight(kernel_size: Sequence[int]) -> float:
    """How many values a `Stack` holds at once for each weight, about."""
    taps, points = math.prod(kernel_size), math.prod(2 * k - 1 for k in kernel_size)
    coarse = math.prod(k | 1 for k in kernel_size)
    return 10 + 2 * points / taps + 5 * coarse / taps


class Stack:
    """Filter banks of one shape, and the state of the conjugate gradients that move them.

    Args:
        banks: ``[G, M, C, *kernel_size]`` each.
        settings: What is lowered, and how.
    """

    def __init__(self, banks: Sequence[Tensor], settings: Settings) -> None:
        self._banks, self._settings = banks, settings
        self._preserve, self._summed = settings.norm == "preserve", settings.channels == "all"
        together = torch.cat(list(banks))  # [L * G, M, C, *kernel_size]
        groups, filters, channels, *kernel_size = banks[0].shape
        like = together.new_empty(0)
        self._dtype, self._wide = like.dtype, torch.float32 if like.device.type == "mps" else torch.float64
        self._fourier = Fourier(kernel_size, like.dtype, like.device)

        norms = filter_norms(together).view(len(banks), groups, filters)
        mean = norms.square().mean((1, 2), keepdim=True).sqrt().expand_as(norms)
        self._scale = norms if self._preserve else mean  # [L, G, M]
        pairs = torch.stack([count_pairs(alive, settings.pairs) for alive in norms > 0])  # [L]
        self._unit = 1 / pairs.clamp(min=1).to(norms) if self._preserve else mean[:, 0, 0] ** 4

        whole = self._fourier.blocks(together, nonzero(self._scale).flatten(0, 1), most=together.numel())
        ((_, _, coordinates),) = whole  # [T, L * G, C, M]
        taps = len(coordinates)
        self._vectors = like.new_zeros(4, taps, len(banks), groups, channels, filters)
        self._weights, self._ascent, self._previous, self._gradient = self._vectors
        self._weights.copy_(coordinates.view_as(self._weights))

        def per_layer(value: float, dtype: torch.dtype = self._wide) -> Tensor:
            return torch.full((len(banks), 1, 1, 1), value, dtype=dtype, device=like.device)

        self._norms = self._scale.new_ones(len(banks), groups, 1, filters, dtype=self._wide)
        # Of the directions the squared norms; of the gradients what is taken along the filters in advance; of the
        # gradients before what was left of that, and how far they went along the directions.
        self._line = self._norms.new_zeros(4, *self._norms.shape)
        self._distance, self._target = per_layer(0), per_layer(0)  # where the layers stand on their lines, and go
        self._energy, self._reached, self._start = (per_layer(math.inf) for _ in range(3))
        self._steps, self._tries, self._idle = per_layer(-1, torch.int64), per_layer(0), per_layer(0)
        self._restarted, self._converged = per_layer(False, torch.bool), per_layer(False, torch.bool)
        self._losses = per_layer(math.nan).repeat(settings.steps + 1, 1, 1, 1, 1)  # [steps + 1, L, 1, 1, 1]
        self.moving = per_layer(True, torch.bool)

    def iterate(self) -> None:
        """One iteration of every layer that moves; only launches kernels, always the same ones."""
        loss, left, steepness, climb, overlap = self._arrive()
        retried = self._tries > 0
        self._aim(self._judge(loss), retried, left, steepness, climb, overlap)

    def descents(self) -> list[Descent]:
        """How the descents went, with the weights where they stand."""
        shape = torch.Size([len(self._banks) * self._banks[0].shape[0], *self._banks[0].shape[1:]])
        whole = slice(None)
        moved = self._fourier.bank([(whole, whole, self._weights.flatten(1, 2))], shape)
        scale = self._scale
        if self._preserve:  # also undoes the rounding of many steps
            scale = scale / nonzero(filter_norms(moved).view_as(scale))
        lowered = (moved * per_filter(scale.flatten(0, 1), moved)).to(self._dtype).chunk(len(self._banks))
        losses = (self._losses.flatten(1) * self._unit).T.tolist()
        finite = torch.stack([bank.isfinite().all() for bank in lowered]).tolist()
        steps, converged = self._steps.flatten().tolist(), self._converged.flatten().tolist()
        found = []
        for i, bank in enumerate(self._banks):
            seen = losses[i][: max(0, steps[i]) + 1]
            if finite[i] and all(map(math.isfinite, seen)):
                found.append(Descent(lowered[i], seen, Stop.CONVERGED if converged[i] else Stop.STEPS))
            else:
                found.append(Descent(bank, seen, Stop.NON_FINITE))
        return found

    def _arrive(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Move every layer to its target.

        Returns:
            The loss there, and of its gradient, less what was taken in advance, the inner products per filter with the
            filter, with itself, with the direction, and with the gradient before.
        """
        taken = self._line[1]
        old, new = self._stretch(self._distance), self._stretch(self._target)
        moves = self._target != self._distance
        keep = torch.where(moves, old / (new * self._norms), 1).to(self._dtype)
        add = torch.where(moves, (self._distance - self._target) / new, 0).to(self._dtype)
        self._weights.mul_(keep).addcmul_(self._ascent, add)
        self._distance.copy_(self._target)

        spectrum = self._empty(self._fourier.points)
        self._fourier.full.forward(Halves(self._weights), out=spectrum)
        power = _cross_power(spectrum, spectrum)  # [F, L, G, C, M]
        power = power.sum(-2, keepdim=True) if self._summed else power
        partners = partner_power(power, self._settings.pairs)
        partners.sub_(
            self._fourier.identity[..., None] * (taken / 2).to(self._dtype)
        )  # what a gradient along the filter comes from
        spectrum.first.mul_(partners)
        spectrum.second.mul_(partners[1:])
        self._fourier.full.twice_adjoint(spectrum, out=Halves(self._gradient))

        products = (self._vectors * self._gradient).sum((1, 4)).to(self._wide)[..., None, :]  # [4, L, G, 1, M]
        left, climb, overlap, steepness = products
        norms: Tensor = torch.linalg.vector_norm(self._weights, dim=(0, 3)).to(self._wide)[..., None, :]
        loss = _total(left + taken * norms.square()) / 4
        if self._preserve:
            self._norms.copy_(nonzero(norms))
            broken = (self._norms - 1).abs().amax((1, 2, 3), keepdim=True) > TRUSTED
            loss = torch.where(broken, math.inf, loss)
        return loss, left, steepness, climb, overlap

    def _judge(self, loss: Tensor) -> Tensor:
        """Note the losses that are lower; where one is not, come back by a quarter, in the end altogether, or stop.

        Returns:
            Which layers go on from where they stand.
        """
        first = self._steps < 0
        lower = self.moving & (loss < self._reached) & (first | (self._target > 0))
        failed = self.moving & ~lower
        home = failed & (self._target == 0)
        stuck = home & self._restarted

        gain = self._reached - loss
        self._reached.copy_(torch.where(lower, loss, self._reached))
        self._start.copy_(torch.where(lower & first, loss, self._start))
        self._steps.add_(lower)
        self._losses.scatter_(0, self._steps.clamp(min=0)[None], torch.where(first, loss, self._reached)[None])

        # Wide layers start on a plateau: for some steps nearly nothing is gained, and then the more.
        on_plateau = (loss > OFF_PLATEAU * self._start) & (self._steps < PATIENCE)
        idle = (gain < self._settings.tolerance * self._start) & ~on_plateau
        self._idle.copy_(torch.where(lower, (self._idle + 1) * idle, self._idle))
        ended = lower & ((self._idle == IDLE_STEPS) | (loss <= NOTHING_LEFT * self._start))
        self._converged |= ended | stuck
        self.moving &= ~self._converged & (self._steps < self._settings.steps)

        self._tries.copy_((self._tries + 1) * (failed & ~home))
        self._restarted.copy_(home | (self._restarted & ~lower))
        quarter = torch.where(self._tries < BACKTRACKS, self._target / 4, 0)
        self._target.copy_(torch.where(failed & ~home, quarter, self._target))
        return self.moving & (lower | home)

    def _aim(
        self, aiming: Tensor, retried: Tensor, left: Tensor, steepness: Tensor, climb: Tensor, overlap: Tensor
    ) -> None:
        """Choose the conjugate direction (Polak-Ribière), and as target the distance to the lowest loss along it."""
        speed, taken, radial_before, climb_before = self._line
        stretch = self._stretch(self._distance)
        # Of the gradient, what is still along the filters; of the direction, what moving has turned along them.
        radial = left / self._norms.square() if self._preserve else torch.zeros_like(left)
        tilt = self._distance * speed / stretch if self._preserve else radial
        along = taken + radial
        steepness = (steepness - radial.square()).clamp(min=0)
        climb = climb + tilt * radial
        before = (radial_before - self._distance * climb_before) / stretch
        energy, overlap = _total(steepness), _total(overlap - radial * before)
        rounding = (ROUNDING * torch.finfo(self._dtype).eps) ** 2 * _total(along.square())

        beta = ((energy - overlap) / self._energy).clamp(min=0)
        restart = retried | (energy + beta * _total(climb) <= 0)
        if self._preserve:
            restart |= self._distance.square() * speed.amax((1, 2, 3), keepdim=True) > FAR
        beta = torch.where(restart, 0, beta)
        lean = beta * tilt - radial
        speed = (steepness + 2 * beta * climb + beta.square() * (speed - tilt.square())).clamp(min=0)

        ascent = torch.addcmul(self._gradient, self._ascent, beta.to(self._dtype))
        if self._preserve:
            ascent.addcmul_(self._weights, lean.to(self._dtype))
        torch.where(aiming, ascent, self._ascent, out=self._ascent)
        torch.where(aiming, self._gradient, self._previous, out=self._previous)
        line = torch.stack([speed, along, radial, steepness + beta * climb])
        torch.where(aiming, line, self._line, out=self._line)
        self._energy.copy_(torch.where(aiming, energy, self._energy))

        # Where the expansion falls for ever, turn the fastest filter by an eighth and see.
        distance = least_rise(*self._look(speed), otherwise=speed.amax((1, 2, 3), keepdim=True).rsqrt())
        worthwhile = (energy > rounding) & (_total(speed) > rounding)
        self._target.copy_(torch.where(aiming, torch.where(worthwhile, distance, 0), self._target))
        self._distance.copy_(torch.where(aiming, 0, self._distance))

    def _look(self, speed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Coefficients of 1, the distance t, its square and cube in the slope of the loss down the direction.

        The power is ``P - 2 t P1 + t^2 P2`` there, up to the third order in t where norms are preserved. Seen on the
        coarse lattice, where correlations wrap around, the lowest loss lies at nearly the same distance.
        """
        weights, ascent = Halves(self._weights), Halves(self._ascent)
        if not self._fourier.coarse_is_free:
            seen_weights, seen_ascent = (self._empty(self._fourier.coarse_points) for _ in range(2))
            self._fourier.coarse.forward(weights, out=seen_weights)
            self._fourier.coarse.forward(ascent, out=seen_ascent)
            weights, ascent = seen_weights, seen_ascent
        powers = self._weights.new_empty(3, len(weights.first), *self._weights.shape[1:])  # [3, F, L, G, C, M]
        for power, a, b in zip(powers, (weights, weights, ascent), (weights, ascent, ascent), strict=True):
            _cross_power(a, b, out=power)
        if self._preserve:
            powers[2].addcmul_(powers[0], speed.to(self._dtype), value=-1)
        powers[:, 0] *= self._fourier.coarse_constant
        powers = powers.sum(-2, keepdim=True) if self._summed else powers
        partners = partner_power(powers, self._settings.pairs)
        rows, partner_rows = (values.flatten(1, 4).transpose(0, 1) for values in (powers, partners))  # [F L G C, 3, M]
        couplings = (rows @ partner_rows.mT).view(*powers.shape[1:5], 3, 3)  # [F, L, G, C, 3, 3]
        c = couplings.sum((0, 2, 3), dtype=self._wide)[..., None, None, None]  # [L, 3, 3, 1, 1, 1]
        return -2 * c[:, 0, 1], 4 * c[:, 1, 1] + 2 * c[:, 0, 2], -6 * c[:, 1, 2], 2 * c[:, 2, 2]

    def _stretch(self, distance: Tensor) -> Tensor:
        """What filters that went ``distance`` along the tangent are divided by to be of unit norm."""
        return (1 + distance.square() * self._line[0]).sqrt() if self._preserve else torch.ones_like(self._norms)

    def _empty(self, points: int) -> Halves:
        return Halves(self._weights.new_empty(points, *self._weights.shape[1:]))


def _cross_power(a: Halves, b: Halves, out: Tensor | None = None) -> Tensor:
    """Real part of the cross-power of two spectra ``[N, ...]``: ``[F, ...]``, in ``out`` if given."""
    power = torch.mul(a.first, b.first, out=out)
    power[1:].addcmul_(a.second, b.second)
    return power


def _total(values: Tensor) -> Tensor:
    """Sums per layer of values per filter."""
    return values.sum((1, 2, 3), keepdim=True)
