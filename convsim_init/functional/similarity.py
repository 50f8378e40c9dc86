"""Convolutional Similarity: what is minimized, exact and differentiable (arXiv 2411.03226).

Letters: G groups, M filters of a group, C input channels of a group, T taps of a kernel. A kernel's power spectrum
lives on N lattice points, of which F = (N + 1) / 2 are distinct frequencies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convsim_init.functional.bank import (
    accumulation_dtype,
    count_pairs,
    filter_bank,
    filter_norms,
    full_precision,
    unit_filters,
)
from convsim_init.functional.fourier import real_fourier_basis
from convsim_init.settings import CHANNELS, PAIRS, Channels, Pairs, check_choice


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
    (arXiv 2411.03226). Where it vanishes for two filters, their feature maps are orthogonal: with ``channels="all"``
    for every input, with ``"matched"`` for every input whose channels are uncorrelated with each other. By Parseval's
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
            scale, and from 0 to the number of a kernel's taps. Weights drawn independently from a symmetric
            distribution have on average 1 over the number of a group's input channels, or 1 with ``channels="all"``.
            Filters that are zero form no pair; a layer without pairs has similarity 0.

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
        similarity = bank_similarity(unit_filters(bank, norms), pairs, channels)
        return similarity / count_pairs(norms > 0, pairs).clamp(min=1)


def bank_similarity(bank: Tensor, pairs: Pairs, channels: Channels) -> Tensor:
    """Raw Convolutional Similarity of a filter bank ``[G, M, C, *kernel_size]``."""
    basis = real_fourier_basis(bank.shape[3:], bank.dtype, bank.device)  # [N, T]
    spectrum = torch.einsum("nt,gmct->ngcm", basis, bank.reshape(*bank.shape[:3], -1))
    power = power_spectrum(spectrum, channels)  # [F, G, C, M]
    return torch.sum(power * partner_power(power, pairs)) / 2


def power_spectrum(spectrum: Tensor, channels: Channels, *, out: Tensor | None = None) -> Tensor:
    """Power of Fourier coefficients ``[N, G, C, M]``; that of each channel in ``out`` if given.

    Returns:
        ``[F, G, C, M]``; with ``channels="all"`` the sum over channels, ``[F, G, 1, M]``.
    """
    frequencies = spectrum.shape[0] // 2 + 1
    cosines, sines = spectrum[:frequencies], spectrum[frequencies:]
    # The constant, which is the first cosine, has no sine.
    power = torch.square(cosines, out=out)
    power[1:].addcmul_(sines, sines)
    return power.sum(2, keepdim=True) if channels == "all" else power


def partner_power(power: Tensor, pairs: Pairs, *, out: Tensor | None = None) -> Tensor:
    """For each filter, along the last dimension, the summed power of those it is paired with; in ``out`` if given.

    Linear and symmetric: with P the power, ``CS = <P, partner_power(P)> / 2`` and ``dCS/dP = partner_power(P)``.
    """
    if pairs == "all":
        return torch.sub(power.sum(-1, keepdim=True), power, out=out)
    partners = torch.zeros_like(power) if out is None else out.zero_()
    partners[..., 1:].add_(power[..., :-1])
    partners[..., :-1].add_(power[..., 1:])
    return partners


def weights_at_once(bank: Tensor, channels: Channels, max_weights: int) -> int:
    """How many weights of a bank a pass over parts of it takes at once: ``max_weights``, or all where it stays whole.

    Over all channels similarity is ``<sum_c P_c, Q sum_d P_d>``, with P the power and Q the sum over partners: no sum
    over parts of the channels. On an accelerator one large operation is faster than several.
    """
    return bank.numel() if channels == "all" or bank.device.type != "cpu" else max_weights
