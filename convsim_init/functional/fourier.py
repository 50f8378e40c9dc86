"""Fourier transforms of many small kernels at once, in coordinates that make them cheap.

Taps are rotated into the even and the odd part of a kernel about its centre: cosines see only the one, sines only the
other. Where every side of the kernel is odd, the rotation is the Fourier transform on a lattice just as large as the
kernel itself, so that the weights *are* their coefficients there.

Letters: T taps a kernel, N points of the lattice, g groups, c input channels, M filters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

CACHED = 2**17  # weights of a block, as measured: larger ones leave the cache, with smaller ones calls cost more


class Part(NamedTuple):
    """Index of a part of a bank ``[G, M, C, ...]``: all filters of some groups, of some channels."""

    groups: slice
    filters: slice
    channels: slice


def cuts(shape: Sequence[int], max_weights: int) -> Iterator[Part]:
    """The parts of about ``max_weights`` into which a bank ``[G, M, C, ...]`` is cut.

    A power of two of them and of nearly equal size, where that is possible: so they suit most numbers of threads.
    """
    groups, channels = shape[0], shape[2]
    # 2^ceil(log2 n) of n parts, without the rounding of a logarithm.
    count = 1 << (math.ceil(math.prod(shape) / max_weights) - 1).bit_length()
    room = math.ceil(groups * channels / count)  # in channels
    group_step, channel_step = max(1, room // channels), min(room, channels)
    for g in range(0, groups, group_step):
        for c in range(0, channels, channel_step):
            yield Part(slice(g, g + group_step), slice(None), slice(c, c + channel_step))


def real_fourier_basis(
    kernel_size: Sequence[int], dtype: torch.dtype, device: torch.device, lattice: Sequence[int] | None = None
) -> Tensor:
    """Real Fourier basis, around the kernel's centre, of a periodic lattice with an odd number of points an axis.

    The default has ``2k - 1`` points an axis: there a kernel's full cross-correlations just fit without wrapping.

    Returns:
        ``[N, T]`` for N points: F rows of cosines, the constant first, then N - F rows of sines. Rows carry the fourth
        root of their Parseval weight, so that the inner product of two power spectra is an energy.
    """
    # torch.compile warns of caches, and what a mode such as FakeTensorMode makes is of no use outside it.
    make = _basis if torch.compiler.is_compiling() or type(torch.empty(0)) is not Tensor else _cached_basis
    return make(tuple(kernel_size), tuple(lattice or (2 * k - 1 for k in kernel_size)), dtype, device)


class Halves:
    """A tensor ``[R, g, c, M]`` and views of its first and second half of rows: even and odd, or cosines and sines.

    The views are made once: in a loop over small blocks making them costs as much as the arithmetic.
    """

    def __init__(self, whole: Tensor) -> None:
        # Views, because the tensors given are contiguous: copies would miss what is written later.
        half = (len(whole) + 1) // 2
        self.whole = whole
        self.first, self.second = whole[:half], whole[half:]
        self.first_rows, self.second_rows = self.first.flatten(1), self.second.flatten(1)
        self.flat = whole.flatten()


class Fourier:
    """The transforms of kernels of one size; ``folded`` coordinates are sums and differences of opposite taps always.

    Attributes:
        rotation: Orthogonal ``[T, T]``: from taps to the coordinates, even ones first.
        points: N of the lattice on which full cross-correlations just fit.
        coarse_points: N of the smallest lattice of odd sides on which norms are still exact.
        identity: Power ``[F, 1, 1, 1]`` whose product with the coefficients of kernels
            `Basis.twice_adjoint` maps to twice these kernels.
        coarse_is_free: Whether the coordinates are the coefficients on the coarse lattice, up to their weights.
        coarse_constant: Factor of the constant's power then, relative to that of the others.
        full, coarse: The bases of both lattices, over the coordinates.
    """

    def __init__(
        self, kernel_size: Sequence[int], dtype: torch.dtype, device: torch.device, *, folded: bool = False
    ) -> None:
        cpu, taps = torch.device("cpu"), math.prod(kernel_size)
        full = real_fourier_basis(kernel_size, torch.float64, cpu)  # [N, T]
        # Parseval: a lattice of k points an axis or more keeps norms. Where k is even it takes one
        # more: else a frequency besides zero would be its own mirror, without a sine.
        coarse = real_fourier_basis(kernel_size, torch.float64, cpu, [k | 1 for k in kernel_size])
        self.points, self.coarse_points = len(full), len(coarse)
        self.coarse_is_free = self.coarse_points == taps and not folded
        # B^T diag(identity) B = 1: rows of B carry (2/N)^(1/4), and Parseval's weight is 2/N.
        identity = full.new_full((self.points // 2 + 1, 1, 1, 1), math.sqrt(2 / self.points))
        identity[0] = math.sqrt(1 / self.points)
        self.identity = identity.to(device, dtype)
        lengths = torch.linalg.vector_norm(coarse, dim=1, keepdim=True)
        rotation = coarse / lengths if self.coarse_is_free else _parity_rotation(taps)
        self.rotation = rotation.to(device, dtype)
        # Rows of the basis are (2/N)^(-1/4) times orthonormal ones, the constant's (1/N)^(-1/4):
        # its power, a square, is sqrt(2) times as large next to that of the others.
        self.coarse_constant = math.sqrt(2) if self.coarse_is_free else 1.0
        self.full = Basis(full @ rotation.T, self.rotation)
        self.coarse = Basis(coarse @ rotation.T, self.rotation)

    def blocks(self, bank: Tensor, scale: Tensor, max_weights: int) -> Iterator[tuple[Part, Tensor]]:
        """The parts of `cuts` of a bank ``[G, M, C, *kernel_size]`` over ``scale`` ``[G, M]``.

        Yields:
            A part, and the coordinates ``[T, g, c, M]`` of what it selects.
        """
        kernels = bank.flatten(3)  # [G, M, C, T]
        for part in cuts(bank.shape, max_weights):
            # The scale is in float64 where norms are very small or large (see `filter_norms`).
            scaled = kernels[part] / scale[part.groups, :, None, None]
            taps = scaled.to(bank.dtype).permute(3, 0, 2, 1)  # [T, g, c, M]
            rotated = torch.mm(self.rotation, taps.reshape(len(taps), -1))
            yield part, rotated.view(taps.shape)

    def bank(self, blocks: Iterable[tuple[Part, Tensor]], shape: torch.Size) -> Tensor:
        """The bank of that shape that was cut into blocks by `blocks`."""
        bank = self.rotation.new_empty(*shape[:3], len(self.rotation))  # [G, M, C, T]
        for part, coordinates in blocks:
            taps = torch.mm(self.rotation.T, coordinates.flatten(1)).view(coordinates.shape)
            bank[part] = taps.permute(1, 3, 2, 0)
        return bank.view(shape)


class Basis:
    """A Fourier basis ``[N, T]``: ``first`` of cosines over even coordinates, ``second`` of sines over odd ones."""

    def __init__(self, basis: Tensor, like: Tensor) -> None:
        cosines, even = (len(basis) + 1) // 2, (basis.shape[1] + 1) // 2
        self.first, self.second = basis[:cosines, :even].to(like), basis[cosines:, even:].to(like)
        self._twice_first, self._twice_second = 2 * self.first.T, 2 * self.second.T

    def forward(self, coordinates: Halves, out: Halves) -> None:
        """Coefficients ``[N, g, c, M]`` of kernels ``[T, g, c, M]``."""
        torch.mm(self.first, coordinates.first_rows, out=out.first_rows)
        torch.mm(self.second, coordinates.second_rows, out=out.second_rows)

    def twice_adjoint(self, spectrum: Halves, out: Halves) -> None:
        """Twice the adjoint of `forward`, ``[N, g, c, M]`` to ``[T, g, c, M]``."""
        torch.mm(self._twice_first, spectrum.first_rows, out=out.first_rows)
        torch.mm(self._twice_second, spectrum.second_rows, out=out.second_rows)


def squared_frequencies(sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    """|f|^2 ``[*sizes]`` of all frequencies f of the Fourier transform on a periodic lattice of these sides."""
    axes = [torch.fft.fftfreq(size, dtype=dtype, device="cpu") for size in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0)


def _parity_rotation(taps: int) -> Tensor:
    """Orthogonal ``[T, T]``: sums of opposite taps (the middle one alone), then their differences."""
    identity = torch.eye(taps, dtype=torch.float64, device="cpu")
    half = taps // 2
    ahead, behind = identity[:half], identity.flip(0)[:half]
    return torch.cat([(ahead + behind) / 2**0.5, identity[half : taps - half], (ahead - behind) / 2**0.5])


@torch.inference_mode(False)  # a tensor made in inference mode could not be used in training afterwards
def _basis(kernel_size: tuple[int, ...], lattice: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    points = math.prod(lattice)
    # In this order the last frequency mirrors the first, and so on: one half, from the zero in the middle, is enough.
    frequencies = _grid([-(n // 2) for n in lattice], lattice)[points // 2 :]  # [F, rank]
    taps = _grid([0] * len(kernel_size), kernel_size)  # [T, rank]
    turns = frequencies / torch.tensor(lattice, dtype=torch.float64, device="cpu")
    phase = 2 * math.pi * turns @ (taps - taps.mean(0)).T  # [F, T]
    basis: Tensor = torch.cat([phase.cos(), phase[1:].sin()]) * (2 / points) ** 0.25
    basis[0] = (1 / points) ** 0.25
    return basis.to(device, dtype)


_cached_basis = lru_cache(maxsize=256)(_basis)  # kept on its device, because copying it there would make the host wait


def _grid(starts: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """All points of a lattice, a row each; made by PyTorch alone, because torch.compile may have symbols for sizes."""
    axes = [torch.arange(n, dtype=torch.float64, device="cpu") + start for start, n in zip(starts, sizes, strict=True)]
    if not axes:
        return torch.zeros(1, 0, dtype=torch.float64, device="cpu")
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)
