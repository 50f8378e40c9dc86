"""Layers on an accelerator descend together: those of equal shape stacked, the stacks side by side."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from convsim_init.functional.similarity import full_precision
from convsim_init.layers.find import Layer, shape_obstacle
from convsim_init.optim.descent import Descent
from convsim_init.optim.stacked import descend_stacks, values_per_weight
from convsim_init.settings import Settings

SHARE_OF_FREE_MEMORY = 0.5
VALUES_AT_ONCE = 2**28  # where a device does not tell how much memory is free

Member = tuple[str, Tensor]  # a layer's name and its bank


def descend_together(
    layers: Sequence[Layer],
    settings: Settings,
    device: torch.device | str | None = None,
    *,
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, tuple[Descent, float]]:
    """Lower the similarity of the layers that are computed on an accelerator; nothing is written to them yet.

    Args:
        layers: Convolutions; those that cannot be treated, by their obstacle or their shape, are left out.
        settings: How. Where the optimizer is another than conjugate gradients, no layer descends here.
        device: Where to compute. Default: where each weight is.
        on_step: Called every few steps; what it raises ends it.

    Returns:
        By layer's name how it went, and its share, by weights, of the seconds that it took.
    """
    found: dict[str, tuple[Descent, float]] = {}
    if settings.optimizer != "conjugate_gradient":
        return found
    for place, members in _by_device(layers, settings, device).items():
        for load in _loads(members, free_values(place)):
            started = time.perf_counter()
            with full_precision(place):
                descents = descend_stacks([[bank for _, bank in stack] for stack in load], settings, on_step=on_step)
            seconds = time.perf_counter() - started
            weights = sum(bank.numel() for stack in load for _, bank in stack)
            for stack, results in zip(load, descents, strict=True):
                for (name, bank), descent in zip(stack, results, strict=True):
                    found[name] = descent, seconds * bank.numel() / weights
    return found


def is_accelerator(device: torch.device) -> bool:
    """Whether layers on that device are stacked."""
    return device.type != "cpu"


def free_values(device: torch.device) -> int:
    """How many values of 4 bytes stacks may hold there at once."""
    if device.type != "cuda":
        return VALUES_AT_ONCE
    free, _ = torch.cuda.mem_get_info(device)
    return int(SHARE_OF_FREE_MEMORY * free / 4)


def _by_device(
    layers: Iterable[Layer], settings: Settings, device: torch.device | str | None
) -> dict[torch.device, list[Member]]:
    members = defaultdict[torch.device, list[Member]](list)
    for layer in layers:
        place = torch.device(device or layer.device)
        if layer.obstacle is None and is_accelerator(place):
            bank = layer.bank(settings.channels, device)
            if shape_obstacle(bank.shape, settings.channels) is None:
                members[bank.device].append((layer.name, bank))
    return members


def _loads(members: Iterable[Member], room: int) -> Iterator[list[list[Member]]]:
    """Stacks of equal shape and dtype, as many at once as there is room for."""
    load = defaultdict[object, list[Member]](list)
    held = 0.0
    for name, bank in members:
        needed = bank.numel() * values_per_weight(bank.shape[3:]) * bank.element_size() / 4
        if load and held + needed > room:
            yield list(load.values())
            load.clear()
            held = 0.0
        load[bank.shape, bank.dtype].append((name, bank))
        held += needed
    if load:
        yield list(load.values())
