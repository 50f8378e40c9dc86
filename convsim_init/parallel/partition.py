"""The layers of a model divided over ranks: each is treated by one of them, and all come to have what it came to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from convsim_init.errors import InputError
from convsim_init.layers.find import Layer
from convsim_init.parallel.processes import Ranks
from convsim_init.report.report import LayerReport

OVERHEAD = 25_000  # weights that take as long as what a layer costs however small it is; measured
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def own_layers(layers: Sequence[Layer], ranks: Ranks) -> list[Layer]:
    """Those that this rank treats, the largest first.

    Raises:
        InputError: If the ranks do not start from the same layers and weights.
    """
    if ranks.size > 1:
        _check_alike(layers, ranks)
    costs = [OVERHEAD + math.prod(layer.shape) if layer.obstacle is None else 0 for layer in layers]
    owners = deal(costs, ranks.size)
    own = [layer for layer, owner in zip(layers, owners, strict=True) if owner == ranks.rank]
    return sorted(own, key=lambda layer: -math.prod(layer.shape))


def share(
    layers: Sequence[Layer],
    own: Mapping[str, LayerReport],
    ranks: Ranks,
    *,
    device: torch.device | str | None = None,
) -> list[LayerReport]:
    """What became of every layer, and its weight in every rank.

    Args:
        layers: All, in order.
        own: What became of those that this rank has treated.
        ranks: All that `own_layers` divided them over.
        device: Where they compute, and weights travel from. Default: where each weight is.
    """
    reports = {name: (report, rank) for rank, some in enumerate(ranks.exchange(own)) for name, report in some.items()}
    for layer in layers:
        report, owner = reports[layer.name]
        if report.after:
            ranks.copy(layer.weight.storage(), owner, device=device)
    return [reports[layer.name][0] for layer in layers]


def deal(costs: Sequence[float], hands: int) -> list[int]:
    """Which of so many hands takes each item, so that none has much more to do: the dearest first, to the least busy.

    The most that one has is at most 4/3 of what it is in the best of divisions (Graham, *Bounds on multiprocessing
    timing anomalies*, 1969).
    """
    owners, load = [0] * len(costs), [0.0] * hands
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        owners[item] = min(range(hands), key=load.__getitem__)
        load[owners[item]] += costs[item]
    return owners


def _check_alike(layers: Sequence[Layer], ranks: Ranks) -> None:
    first, *others = ranks.exchange([_fingerprint(layer) for layer in layers])
    for rank, other in enumerate(others, 1):
        if [one[0] for one in other] != [one[0] for one in first]:
            raise InputError(f"group: expected the same model in every rank, got another in rank {rank} than in rank 0")
        for (about, weights), (_, others_weights) in zip(first, other, strict=True):
            if weights != others_weights:
                raise InputError(
                    f"group: expected every rank to start from the same weights, got others for {about[0]!r} in rank "
                    f"{rank} than in rank 0: build the model from the same seed or file in each"
                )


def _fingerprint(layer: Layer) -> tuple[tuple[object, ...], tuple[int, ...]]:
    about = (layer.name, layer.kind, layer.shape, layer.groups, layer.transposed, layer.obstacle)
    return about, () if layer.obstacle else tuple(map(_checksum, layer.weight.sources))


@torch.no_grad()
def _checksum(tensor: Tensor) -> int:
    """The sum of a tensor's bits as integers: tells one draw from another, in one pass on any device."""
    return int(tensor.detach().contiguous().view(INTEGERS[tensor.element_size()]).sum())
