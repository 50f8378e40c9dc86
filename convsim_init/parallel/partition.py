"""The layers of a model divided over ranks: one treats each layer, and all get its result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from convsim_init.errors import InputError
from convsim_init.layers.layer import Layer, largest_first
from convsim_init.parallel.processes import Ranks
from convsim_init.report.report import LayerReport
from convsim_init.settings import Settings

OVERHEAD = 25_000  # the fixed cost of a layer, as measured, in the time that a weight takes
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def own_layers(layers: Sequence[Layer], settings: Settings, ranks: Ranks) -> list[Layer]:
    """The layers that this rank treats, the largest first; an `InputError` if ranks start from different ones."""
    if ranks.size > 1:
        _check_alike(layers, settings, ranks)
    owners = deal([cost(layer) for layer in layers], ranks.size)
    return largest_first(layer for layer, owner in zip(layers, owners, strict=True) if owner == ranks.rank)


def cost(layer: Layer) -> int:
    """About how long a layer takes, in the time that a weight takes."""
    return OVERHEAD + math.prod(layer.shape) if layer.obstacle is None else 0


def share(
    layers: Sequence[Layer], own: Mapping[str, LayerReport], ranks: Ranks, *, device: torch.device | str | None = None
) -> list[LayerReport]:
    """Give every rank all new weights; the reports of all layers, in order, from this rank's own by name.

    Weights travel from the device, or else from where they are.
    """
    by_rank = enumerate(ranks.exchange(own))
    reports = {name: (report, rank) for rank, its_reports in by_rank for name, report in its_reports.items()}
    for layer in layers:
        report, owner = reports[layer.name]
        # Every rank has the reports of all, so all of them copy the same layers in the same order.
        if report.after:
            ranks.copy(list(layer.weight.storage().values()), owner, device=device)
    return [reports[layer.name][0] for layer in layers]


def deal(costs: Sequence[float], workers: int) -> list[int]:
    """The worker that takes each item: the largest items first, each to the least busy worker.

    The busiest has at most 4/3 of what it has in the best division (Graham, *Bounds on
    multiprocessing timing anomalies*, 1969).
    """
    owners, load = [0] * len(costs), [0.0] * workers
    # The sort is stable, so that every rank finds the same division by itself.
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        owners[item] = min(range(workers), key=load.__getitem__)
        load[owners[item]] += costs[item]
    return owners


def _check_alike(layers: Sequence[Layer], settings: Settings, ranks: Ranks) -> None:
    (first_settings, first), *others = ranks.exchange((settings, [_fingerprint(layer) for layer in layers]))
    for rank, (own_settings, other) in enumerate(others, 1):
        if own_settings != first_settings:
            raise InputError(
                f"group: expected the same settings in every rank, got {own_settings} in rank {rank} and "
                f"{first_settings} in rank 0"
            )
        if [about for about, _ in other] != [about for about, _ in first]:
            raise InputError(f"group: expected the same model in every rank, got another in rank {rank} than in rank 0")
        for (about, sums), (_, sums_of_other) in zip(first, other, strict=True):
            if sums != sums_of_other:
                raise InputError(
                    f"group: expected every rank to start from the same weights, got others for {about[0]!r} in rank "
                    f"{rank} than in rank 0: build the model from the same seed or file in each"
                )


def _fingerprint(layer: Layer) -> tuple[tuple[object, ...], tuple[int, ...]]:
    about = (layer.name, layer.kind, layer.shape, layer.groups, layer.transposed, layer.obstacle)
    return about, () if layer.obstacle else tuple(map(_checksum, layer.weight.sources))


@torch.no_grad()
def _checksum(tensor: Tensor) -> int:
    """Sum of a tensor's bits as integers: differs from draw to draw, in one pass on any device."""
    # Sums of integers do not depend on the order of the terms, as those of floats do.
    return int(tensor.detach().contiguous().view(INTEGERS[tensor.element_size()]).sum())
