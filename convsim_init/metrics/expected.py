"""How alike feature maps of random inputs are expected to be: closed form, from the filters alone, without sampling.

For a stationary input of independent channels with autocorrelation r, the feature maps ``F_i = sum_c K_ic * X_c`` have

    Cov(F_i, F_j) = sum_c K_ic^T R K_jc,    R[t, u] = r(t - u) over the kernel's taps.

With ``R = L L^T`` that is a Gram matrix, of the rows ``K_i L``. The taps lie on the kernels' own lattice: stride,
padding and dilation don't enter. Filters of different groups see different, independent channels: their feature maps
are uncorrelated whatever the weights, so that such pairs say nothing and are not counted.

Letters: G groups, M filters of a group, C input channels of a group, T taps of a kernel.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from convsim_init.functional.bank import count_pairs, filter_norms, unit_filters
from convsim_init.functional.fourier import squared_frequencies

Spectrum = Literal["white", "natural"]
SPECTRA: tuple[Spectrum, ...] = ("white", "natural")
GRID = 64  # points an axis of the grid that the natural spectrum lives on
VALUES_PER_BLOCK = 2**20  # how much of a Gram matrix is held at once


@torch.no_grad()
def expected_correlation(bank: Tensor, spectrum: Spectrum = "natural") -> Tensor:
    """Correlation of every two feature maps of a bank ``[G, M, C, *kernel_size]``, expected over a random input.

    Feature maps of different groups are uncorrelated. The spectrum ``"white"`` has the same power at every frequency;
    ``"natural"`` has power 1/|f|^2 on a grid of 64 points an axis and none at f = 0, about as photographs have.

    Returns:
        ``[G M, G M]``, from -1 to 1. The rows and columns of filters that answer to no input, those that are zero, are
        zero.
    """
    rows, _ = directions(covariance_rows(unit_filters(bank, filter_norms(bank)), spectrum))
    correlation: Tensor = torch.block_diag(*(rows @ rows.mT))  # type: ignore[no-untyped-call]
    return correlation


def covariance_rows(bank: Tensor, spectrum: Spectrum, *, grid: int = GRID) -> Tensor:
    """Rows ``[G, M, C * T]`` whose inner products are the covariances of the feature maps of a bank.

    They are expected over inputs of variance 1. Where the kernel is longer, the grid has as many points as it.
    """
    kernels = bank.reshape(*bank.shape[:3], -1)  # [G, M, C, T]
    if spectrum == "white" or kernels.shape[-1] == 1:
        return kernels.flatten(2)
    factor = _natural_factor(tuple(bank.shape[3:]), grid).to(bank)  # [T, T]
    return (kernels @ factor).flatten(2)


def directions(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows ``[G, M, K]`` of unit filters with length 1, and their lengths ``[G, M]``.

    A filter may have no answer to a spectrum although it is not zero, as a constant one has where the grid is no wider
    than the kernel. Both are then zero, rather than what rounding left.
    """
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    # A unit filter without an answer is left with a length of about eps (7e-8 of a constant one).
    lengths = torch.where(lengths > 16 * torch.finfo(rows.dtype).eps, lengths, 0)
    return torch.where(lengths > 0, 1 / lengths, 0)[..., None] * rows, lengths


def mean_correlation(rows: Tensor) -> float:
    """Mean over pairs within a group of the absolute inner product of rows ``[G, M, K]`` of length 1 or zero.

    Rows that are zero form no pair; without pairs it is 0. Of the ``M x M`` products few are held at once.
    """
    alive = rows.ne(0).any(-1)  # [G, M]
    groups, filters = alive.shape
    group_step = max(1, VALUES_PER_BLOCK // filters**2)
    filter_step = min(filters, max(1, VALUES_PER_BLOCK // filters))
    total = 0.0
    for g in range(0, groups, group_step):
        for i in range(0, filters, filter_step):
            rest = rows[g : g + group_step, i:]  # [g, m, K]
            block = (rest[:, :filter_step] @ rest.mT).abs_()
            diagonal = block.diagonal(dim1=1, dim2=2)
            own = block[..., : diagonal.shape[-1]]  # counts its pairs twice, and each row with itself
            total += float(block.sum()) - float(own.sum()) / 2 - float(diagonal.sum()) / 2
    return total / max(1, int(count_pairs(alive, "all")))


def effective_rank(rows: Tensor) -> float:
    """Exponential of the entropy of the normalized eigenvalues of ``rows rows^T``, over the number of rows.

    Roy and Vetterli, *The effective rank: a measure of effective dimensionality* (2007). Between 0, exclusive, and 1,
    where all rows ``[G, M, K]`` are orthogonal, as those of different groups are, and of one length; 0 where all are 0.
    """
    groups, filters, width = rows.shape
    gram = rows @ rows.mT if filters <= width else rows.mT @ rows  # the same eigenvalues but for zeros
    # Rounding makes some eigenvalues of zero negative, where entr is -inf.
    values = torch.linalg.eigvalsh(gram).double().clamp(min=0)
    total = values.sum()
    if not total > 0:
        return 0.0
    entropy = torch.special.entr(values / total).sum()
    return min(1.0, math.exp(entropy) / (groups * filters))


@lru_cache(maxsize=64)
def _natural_factor(kernel_size: tuple[int, ...], grid: int) -> Tensor:
    """L of ``R = L L^T``, both ``[T, T]``, by eigenvalues: R is singular where the kernel fills the grid."""
    cpu = torch.device("cpu")
    sides = [max(grid, k) for k in kernel_size]
    squares = squared_frequencies(sides, torch.float64)  # [*sides]
    power = torch.where(squares > 0, 1 / squares, 0)
    autocorrelation = torch.fft.ifftn(power).real
    autocorrelation = autocorrelation / autocorrelation.flatten()[0]
    taps = torch.meshgrid(*(torch.arange(k, device=cpu) for k in kernel_size), indexing="ij")
    # The grid is periodic, so that a negative shift wraps around.
    shifts = [(t.flatten()[:, None] - t.flatten()) % side for t, side in zip(taps, sides, strict=True)]
    values, vectors = torch.linalg.eigh(autocorrelation[tuple(shifts)])
    factor: Tensor = vectors * values.clamp(min=0).sqrt()
    return factor
