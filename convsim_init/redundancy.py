"""How redundant the filters of a layer are, in figures."""

from __future__ import annotations

import torch
from torch import Tensor

from convsim_init.settings import Channels
from convsim_init.similarity import bank_similarity, count_pairs, filter_norms, nonzero, per_filter

KERNELS_AT_ONCE = 65536


@torch.no_grad()
def measure_bank(bank: Tensor, channels: Channels = "matched") -> dict[str, float]:
    """Similarity of the filters of a bank ``[G, M, C, *kernel_size]``, over all pairs.

    Returns:
        ``similarity``: the raw Convolutional Similarity; ``normalized_similarity``: the mean over pairs of the
        similarity of two filters over the product of their squared norms, blind to scale.
    """
    norms = filter_norms(bank)  # [G, M]
    size = nonzero(norms.square().mean().sqrt())  # measured in this unit, large weights do not overflow
    similarity = _similarity((bank / size).to(bank.dtype), channels) * float(size) ** 4
    normalized = _similarity((bank / per_filter(nonzero(norms), bank)).to(bank.dtype), channels)
    pairs = int(count_pairs(norms > 0, "all").clamp(min=1))
    return {"similarity": similarity, "normalized_similarity": normalized / pairs}


def _similarity(bank: Tensor, channels: Channels) -> float:
    if channels == "all":
        return float(bank_similarity(bank, "all", channels))
    filters, in_channels = bank.shape[1:3]
    group_room = max(1, KERNELS_AT_ONCE // (filters * in_channels))
    channel_room = max(1, KERNELS_AT_ONCE // filters)
    return sum(
        float(bank_similarity(part, "all", channels))
        for some in torch.split(bank, group_room)
        for part in torch.split(some, channel_room, dim=2)
    )
