"""Convolutional Similarity: what is minimized, exact and differentiable (arXiv 2411.03226).

Letters: G groups, M filters of a group, C input channels of a group, T taps of a kernel. A kernel's power spectrum
lives on N lattice points, of which F = (N + 1) / 2 are distinct frequencies.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from convsim_init.errors import InputError
from convsim_init.settings import CHANNELS, PAIRS, Channels, Pairs, check_choice

SMALL_NORM, LARGE_NORM = 1e-15, 1e15


def convolutional_similarity(
    weight: Tensor,
    *,
    pairs: Pairs = "all",
    channels: Channels = "matched",
    groups: int = 1,
    transposed: bool = False,
    normalized: bool = False,
) -> Tensor:
    """Convolutional Similarity of a layer's filters: the energy of their cross-correlations at every shift.

        CS(W) = Σ_(i,j) Σ_(c,d) ‖K[i,c] ⋆ K[j,d]‖²

    where ``K[i,c]`` is the kernel of filter i for input channel c and ``⋆`` the full cross-correlation
    (arXiv 2411.03226). Where it vanishes, the feature maps of i and j are orthogonal for every input. By Parseval's
    theorem the similarity of two kernels is the inner product of their power spectra, so sums over pairs are products
    of sums: time and memory grow linearly with the number of filters. Differentiable by autograd.

    Args:
        weight: ``[out_channels, in_channels / groups, *kernel_size]``, or, if ``transposed``,
            ``[in_channels, out_channels / groups, *kernel_size]``; any floating dtype, kernels of any rank.
        pairs: ``"all"`` filter pairs i < j, or only ``"adjacent"`` ones (i, i + 1), as the paper's authors publish.
        channels: ``"matched"`` compares kernels of the same input channel (c = d); ``"all"`` every c with every d,
            the exact bound for inputs whose channels are correlated.
        groups: Groups of the convolution. With ``matched`` filters of different groups share no channel and form no
            pair; with ``channels="all"`` every pair of the layer counts.
        transposed: Whether the weight is that of a transposed convolution, whose filters lie along dimension 1.
        normalized: Return the mean over pairs of ``CS(i, j) / (||W_i||^2 ||W_j||^2)`` instead of the sum: blind to
            scale. Filters that are zero form no pair; a layer without pairs has similarity 0.

    Returns:
        A scalar, float64 for float64 weights, else float32.

    Raises:
        InputError: If an option is unknown or the weight's dtype or shape does not fit.

    Examples:
        >>> weight = torch.ones(2, 1, 1, 1)  # two filters that are the same
        >>> float(ci.convolutional_similarity(10 * weight))
        10000.0
        >>> float(ci.convolutional_similarity(10 * weight, normalized=True))
        1.0
    """
    check_choice("pairs", pairs, PAIRS)
    check_choice("channels", channels, CHANNELS)
    bank = filter_bank(weight, groups=groups, transposed=transposed, channels=channels)  # [G, M, C, *kernel_size]
    with full_precision(weight.device):
        bank = bank.to(accumulation_dtype(weight.dtype))
        if not normalized:
            return bank_similarity(bank, pairs, channels)
        norms = filter_norms(bank)  # [G, M]
        unit = (bank / per_filter(nonzero(norms), bank)).to(bank.dtype)
        return bank_similarity(unit, pairs, channels) / count_pairs(norms > 0, pairs).clamp(min=1)


def bank_similarity(bank: Tensor, pairs: Pairs, channels: Channels) -> Tensor:
    """Raw Convolutional Similarity of a filter bank ``[G, M, C, *kernel_size]``."""
    basis = real_fourier_basis(bank.shape[3:], bank.dtype, bank.device)  # [N, T]
    spectrum = torch.einsum("nt,gmct->ngcm", basis, bank.reshape(*bank.shape[:3], -1))
    power = power_spectrum(spectrum, channels)  # [F, G, C, M]
    return torch.sum(power * partner_power(power, pairs)) / 2


def filter_bank(weight: Tensor, *, groups: int = 1, transposed: bool = False, channels: Channels = "matched") -> Tensor:
    """View a convolution's weight as groups of filters that can be similar to each other.

    Returns:
        ``[G, M, C, *kernel_size]``. With ``channels="all"`` every filter can be similar to every other: G is 1.

    Raises:
        InputError: If the weight is no real floating tensor of a convolution with that many groups.
    """
    if not weight.is_floating_point():
        raise InputError(f"expected a convolution weight of a floating dtype, got {weight.dtype}")
    if weight.dim() < 2 or weight.numel() == 0:
        layout = "[in_channels, out_channels / groups" if transposed else "[out_channels, in_channels / groups"
        raise InputError(f"expected a weight of shape {layout}, *kernel_size] without zeros, got {list(weight.shape)}")
    if groups < 1 or weight.shape[0] % groups:
        raise InputError(f"expected groups to divide dimension 0 of the weight {list(weight.shape)}, got {groups}")
    bank = weight.reshape(groups, -1, *weight.shape[1:])
    if transposed:
        bank = bank.transpose(1, 2)
    return bank.flatten(0, 1)[None] if channels == "all" else bank


def computing_bank(
    weight: Tensor, *, groups: int = 1, transposed: bool = False, channels: Channels = "matched"
) -> Tensor:
    """`filter_bank` of a weight in the dtype that computations run in, contiguous; it may share the weight's memory."""
    bank = filter_bank(weight, groups=groups, transposed=transposed, channels=channels)
    return bank.to(accumulation_dtype(weight.dtype), memory_format=torch.contiguous_format)


def bank_weight(bank: Tensor, *, groups: int = 1, transposed: bool = False) -> Tensor:
    """The convolution's weight that `filter_bank` viewed as ``bank``."""
    filters = bank.reshape(groups, -1, *bank.shape[2:])  # [G, M, C, *kernel_size], also where every pair counted
    return (filters.transpose(1, 2) if transposed else filters).flatten(0, 1)


def real_fourier_basis(
    kernel_size: Sequence[int], dtype: torch.dtype, device: torch.device, lattice: Sequence[int] | None = None
) -> Tensor:
    """Real Fourier basis, around the kernel's centre, of a periodic lattice with an odd number of points an axis.

    The default has ``2k - 1`` points an axis: there a kernel's full cross-correlations just fit without wrapping.

    Returns:
        ``[N, T]`` for N points: F rows of cosines, the constant first, then N - F rows of sines. Rows carry the fourth
        root of their Parseval weight, so that the inner product of two power spectra is an energy.
    """
    basis: Tensor = _basis(tuple(kernel_size), tuple(lattice or (2 * k - 1 for k in kernel_size)))
    return basis.to(device, dtype)


@lru_cache(maxsize=64)
def _basis(kernel_size: tuple[int, ...], lattice: tuple[int, ...]) -> Tensor:
    points = math.prod(lattice)
    # In this order the last frequency mirrors the first, and so on: one half, from the zero in the middle, is enough.
    frequencies = _product([range(-(n // 2), n // 2 + 1) for n in lattice])[points // 2 :]  # [F, rank]
    taps = _product([range(k) for k in kernel_size])  # [T, rank]
    turns = frequencies / torch.tensor(lattice, dtype=torch.float64, device="cpu")
    phase = 2 * math.pi * turns @ (taps - taps.mean(0)).T  # [F, T]
    basis: Tensor = torch.cat([phase.cos(), phase[1:].sin()]) * (2 / points) ** 0.25
    basis[0] = (1 / points) ** 0.25
    return basis


def _product(axes: Sequence[range]) -> Tensor:
    return torch.tensor(list(itertools.product(*axes)), dtype=torch.float64, device="cpu").reshape(
        math.prod(map(len, axes)), -1
    )


def power_spectrum(
    spectrum: Tensor, channels: Channels = "matched", *, other: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Power of Fourier coefficients ``[N, G, C, M]``, or their cross-power with ``other`` (its real part).

    Returns:
        ``[F, G, C, M]``, in ``out`` if given; with ``channels="all"`` the sum over channels, ``[F, G, 1, M]``.
    """
    other = spectrum if other is None else other
    frequencies = spectrum.shape[0] // 2 + 1
    power = torch.mul(spectrum[:frequencies], other[:frequencies], out=out)
    power[1:].addcmul_(spectrum[frequencies:], other[frequencies:])
    return power.sum(2, keepdim=True) if channels == "all" else power


def partner_power(power: Tensor, pairs: Pairs, *, dim: int = -1, out: Tensor | None = None) -> Tensor:
    """For each filter, along ``dim``, the summed power of those it is paired with; in ``out`` if given.

    Linear and symmetric: with P the power, ``CS = <P, partner_power(P)> / 2`` and ``dCS/dP = partner_power(P)``.
    """
    if pairs == "all":
        return torch.sub(power.sum(dim, keepdim=True), power, out=out)
    partners = torch.zeros_like(power) if out is None else out.zero_()
    others = power.shape[dim] - 1
    partners.narrow(dim, 1, others).add_(power.narrow(dim, 0, others))
    partners.narrow(dim, 0, others).add_(power.narrow(dim, 1, others))
    return partners


def count_pairs(active: Tensor, pairs: Pairs) -> Tensor:
    """Number of filter pairs, given which filters ``[G, M]`` take part."""
    if pairs == "all":
        filters = active.sum(-1)
        return (filters * (filters - 1) // 2).sum()
    return (active[:, 1:] & active[:, :-1]).sum()


def filter_norms(bank: Tensor) -> Tensor:
    """L2 norms ``[G, M]`` of the filters of a bank ``[G, M, C, *kernel_size]``; no finite filter's overflows."""
    norms: Tensor = torch.linalg.vector_norm(bank.flatten(2), dim=-1)
    if bank.device.type == "mps" or bool(((norms > SMALL_NORM) & (norms < LARGE_NORM)).all()):
        return norms
    filters = bank.flatten(2).double()
    largest = filters.abs().amax(-1)  # squares of shares of it neither vanish nor overflow
    exact: Tensor = largest * torch.linalg.vector_norm(filters / nonzero(largest)[..., None], dim=-1)
    return exact


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor that is not empty holds neither infinities nor NaN; one pass, nothing allocated."""
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))


def nonzero(norms: Tensor) -> Tensor:
    """The norms to divide by: 1 for filters that are zero."""
    return torch.where(norms > 0, norms, 1)


def full_precision(device: torch.device) -> torch.autocast:
    """Context in which an autocast of the caller does not lower the precision of products."""
    return torch.autocast(device.type, enabled=False)


def per_filter(values: Tensor, bank: Tensor) -> Tensor:
    """Reshape ``[G, M]`` so that it multiplies the filters of ``bank``."""
    return values.reshape(*values.shape, *[1] * (bank.dim() - 2))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that computations on weights of ``dtype`` run in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
