"""How redundant the filters of a layer are, in figures."""

from __future__ import annotations

import torch
from torch import Tensor

from convsim_init.fourier import Fourier, Halves
from convsim_init.settings import Channels
from convsim_init.similarity import count_pairs, filter_norms, nonzero, partner_power, per_filter, power_spectrum


@torch.no_grad()
def measure_bank(bank: Tensor, channels: Channels = "matched") -> dict[str, float]:
    """Similarity of the filters of a bank ``[G, M, C, *kernel_size]``, over all pairs.

    Returns:
        ``similarity``: the raw Convolutional Similarity; ``normalized_similarity``: the mean over pairs of the
        similarity of two filters over the product of their squared norms, blind to scale.
    """
    norms = filter_norms(bank)  # [G, M]
    unit = (bank / per_filter(nonzero(norms), bank)).to(bank.dtype)
    size = float(nonzero(norms.square().mean().sqrt()))  # in this unit large weights do not overflow
    energies = (norms / size).square().to(bank.dtype)[:, None]  # [G, 1, M]
    fourier = Fourier(bank.shape[3:], bank.dtype, bank.device)
    raw = normalized = 0.0
    for groups, _, weights in fourier.blocks(unit, whole=channels == "all"):
        spectrum = weights.new_empty(fourier.points, *weights.shape[1:])
        fourier.forward(Halves(weights), out=Halves(spectrum))
        power = power_spectrum(spectrum, channels)  # [F, g, c, M]
        normalized += float(torch.sum(power * partner_power(power, "all"))) / 2
        power = power * energies[groups]
        raw += float(torch.sum(power * partner_power(power, "all"))) / 2
    pairs = int(count_pairs(norms > 0, "all").clamp(min=1))
    return {"similarity": raw * size**4, "normalized_similarity": normalized / pairs}
