"""Similarity of several layers at once, with its gradient: of small ones, calling operations is all that costs.

A pack is a matrix of kernels of one size, those of its layers one after another: K kernels of J filters. Other letters:
G groups, M filters of a group, C input channels of a group, T taps, F frequencies.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import starmap

import torch
from torch import Tensor

from convsim_init.functional.similarity import (
    LARGE_NORM,
    SMALL_NORM,
    count_pairs,
    filter_norms,
    nonzero,
    partner_power,
    real_fourier_basis,
)
from convsim_init.settings import Channels, Pairs

VALUES_PER_PACK = 2**20  # of a spectrum: what stays in a core's cache


class Pack:
    """What layers of known shapes need at every call, made once.

    Args:
        shapes: ``[G, M, C, *kernel_size]`` of their filter banks, whose kernels are of one size.
        pairs: Filter pairs that count.
        channels: Kernels compared.
        dtype: To compute in.
        device: To compute on.

    Attributes:
        kernels: K of each layer.
        dtype: To compute in.
        device: To compute on.
    """

    def __init__(
        self, shapes: Sequence[torch.Size], pairs: Pairs, channels: Channels, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._shapes, self._pairs, self._channels = [shape[:3] for shape in shapes], pairs, channels
        self.kernels = [shape.numel() for shape in self._shapes]
        self.dtype, self.device = dtype, device
        self._filters = [groups * filters for groups, filters, _ in self._shapes]
        basis = real_fourier_basis(shapes[0][3:], dtype, device)
        frequencies = len(basis) // 2 + 1
        zero = torch.zeros_like(basis[:1])  # the constant's sine: with it both halves are alike
        self._basis = torch.cat([basis[:frequencies], zero, basis[frequencies:]])  # [2 F, T]
        self._twice_basis = 2 * self._basis
        full = [torch.ones(shape[:2], dtype=torch.bool, device=device) for shape in shapes]
        self._radii = self._radii_for(full)

    def raw(self, kernels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the layers' similarities, and its gradient, by kernels ``[K, T]``.

        With P the power of the spectrum X and Q that of the partners, CS = <P, Q> / 2 and dCS/dX = 2 Q X.
        """
        alone_and_large = len(self.kernels) == 1 and len(self._basis) * len(kernels) > VALUES_PER_PACK
        if alone_and_large and self._channels == "matched":
            return self._raw_by_channels(kernels)
        return self._raw(kernels, self._shapes)

    def _raw_by_channels(self, kernels: Tensor) -> tuple[Tensor, Tensor]:
        (groups, filters, _), taps = self._shapes[0], kernels.shape[1]
        step = max(1, VALUES_PER_PACK // (len(self._basis) * groups * filters))
        blocks = torch.split(kernels.view(*self._shapes[0], taps), step, dim=2)  # [G, M, c, T]
        parts = [self._raw(block.reshape(-1, taps), [block.shape[:3]]) for block in blocks]
        gradients = [gradient.view(block.shape) for (_, gradient), block in zip(parts, blocks, strict=True)]
        return torch.stack([value for value, _ in parts]).sum(), torch.cat(gradients, dim=2).view(-1, taps)

    def _raw(self, kernels: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, Tensor]:
        spectrum = torch.mm(self._basis, kernels.T).view(2, -1, len(kernels))  # [2, F, K]
        cosines, sines = spectrum.unbind()
        power = torch.mul(cosines, cosines).addcmul_(sines, sines)
        partners = torch.empty_like(power)
        sizes = [shape.numel() for shape in shapes]
        powers, sums = torch.split(power, sizes, 1), torch.split(partners, sizes, 1)
        for shape, some, out in zip(shapes, powers, sums, strict=True):
            own, others = some.view(-1, *shape), out.view(-1, *shape)  # [F, G, M, C]
            if self._channels == "all":
                others.copy_(partner_power(own.sum(3, keepdim=True), self._pairs, dim=2))
            else:
                partner_power(own, self._pairs, dim=2, out=others)
        value = torch.dot(power.view(-1), partners.view(-1)) / 2
        return value, torch.mm(spectrum.mul_(partners).view(-1, len(kernels)).T, self._twice_basis)

    def normalized(self, kernels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the layers' normalized similarities, and its gradient, by kernels ``[K, T]``.

        The mean over pairs of filters of norm 1 is the sum over pairs of filters of norm r = pairs ** (-1 / 4).
        """
        rows = self._rows(kernels)
        lengths, radii = torch.cat([torch.linalg.vector_norm(row, dim=1) for row in rows]), self._radii  # [J]
        shortest, longest = torch.aminmax(lengths)
        if not SMALL_NORM < shortest.item() <= longest.item() < LARGE_NORM:  # some are zero, or squares overflow
            parts = zip(torch.split(kernels, self.kernels), self._shapes, strict=True)
            exact = [filter_norms(part.view(*shape, -1)) for part, shape in parts]  # [G, M]
            radii = self._radii_for([norm > 0 for norm in exact])
            lengths = nonzero(torch.cat([norm.flatten() for norm in exact]))
        norms = self._columns(lengths / radii)
        rows = [(row / norm).to(row.dtype) for row, norm in zip(rows, norms, strict=True)]
        value, gradient = self.raw(torch.cat([row.view(-1, kernels.shape[1]) for row in rows]))
        gradients = self._rows(gradient)
        along = torch.cat(list(starmap(torch.linalg.vecdot, zip(gradients, rows, strict=True)))) / radii.square()
        for part, row, radial, norm in zip(gradients, rows, self._columns(along), norms, strict=True):
            part.addcmul_(row, radial, value=-1).div_(norm)
        return value, gradient

    def _rows(self, kernels: Tensor) -> list[Tensor]:
        """The layers' filters, each ``[G M, C T]``."""
        parts = zip(torch.split(kernels, self.kernels), self._filters, strict=True)
        return [part.view(filters, -1) for part, filters in parts]

    def _columns(self, values: Tensor) -> Sequence[Tensor]:
        """Values ``[J]`` of the filters, as factors of the layers' rows."""
        return torch.split(values[:, None], self._filters)

    def _radii_for(self, active: Sequence[Tensor]) -> Tensor:
        pairs = [count_pairs(some, self._pairs).clamp(min=1).expand(some.numel()) for some in active]
        return torch.cat(pairs).to(self.dtype) ** -0.25  # [J]
