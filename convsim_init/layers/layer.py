"""A convolution of a model or of a state dict, and the list of all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from convsim_init.functional.bank import bank_weight, computing_bank
from convsim_init.layers.forward.isolation import holding_weights_lock
from convsim_init.layers.obstacle import Cause, Obstacle
from convsim_init.layers.symbolic.follow import Followed
from convsim_init.layers.symbolic.uses import find_uses
from convsim_init.layers.weights import Weight
from convsim_init.settings import Channels


@dataclass(eq=False)
class Layer:
    """One convolution.

    Attributes:
        name: Dotted name in the unwrapped model.
        kind: Class of the convolution, or the one that it is taken for.
        weight: Weight that the forward pass uses.
        groups: Number of groups.
        transposed: Whether it is a transposed convolution.
        note: What groups and transposed were inferred from, if there is no module.
        strides: Product of its strides; 1 if they are unknown.
        obstacle: Why it cannot or must not be treated; None if it can.
    """

    name: str
    kind: str
    weight: Weight
    groups: int = 1
    transposed: bool = False
    note: str | None = None
    strides: int = 1
    obstacle: Obstacle | None = None

    @property
    def shape(self) -> list[int]:
        """Shape of the weight; empty while a lazy module has none."""
        return self.weight.shape

    @property
    def filters(self) -> int:
        """Number of filters of a group."""
        # PyTorch stores a transposed weight as [C, M, ...], where M is that of one group.
        return self.shape[1] if self.transposed else self.shape[0] // self.groups

    @property
    def device(self) -> torch.device:
        """Device of the first tensor that the weight is stored in or computed from."""
        return self.weight.sources[0].device

    def bank(self, channels: Channels = "matched", device: torch.device | str | None = None) -> Tensor:
        """The used weight as a filter bank ``[G, M, C, *kernel_size]`` to compute with; it must not be changed."""
        with holding_weights_lock():
            weight = self.weight.read().to(device)
        return computing_bank(weight, groups=self.groups, transposed=self.transposed, channels=channels)

    def mask(self, channels: Channels = "matched", device: torch.device | str | None = None) -> Tensor | None:
        """Where the bank may differ from zero, as a mask of its shape; None for everywhere."""
        mask = self.weight.mask
        if mask is None:
            return None
        # `computing_bank` refuses booleans.
        ones = mask.to(device, torch.float32)
        return computing_bank(ones, groups=self.groups, transposed=self.transposed, channels=channels) != 0

    def write(self, bank: Tensor) -> str | None:
        """Set the used weight to that of a bank ``[G, M, C, *kernel_size]``, on whatever device, as `Weight.write`."""
        weight = bank_weight(bank, groups=self.groups, transposed=self.transposed)
        return self.weight.write(weight.to(self.device))

    def is_left_for(self, *causes: Cause) -> bool:
        """Whether it is left alone for one of these causes."""
        return self.obstacle is not None and self.obstacle.cause in causes

    def explained(self, reason: str | None) -> str | None:
        """The reason of an outcome, preceded by notes on the weight and on what the layer was inferred from."""
        # For a layer that is left alone it is no explanation that it was taken for the usual kind.
        note = None if reason and (self.groups, self.transposed) == (1, False) else self.note
        return ": ".join(filter(None, [self.weight.note, note, reason])) or None


class Layers(list[Layer]):
    """The convolutions of a model, with its symbolic forward passes; or those of a state dict, without."""

    def __init__(self, layers: Iterable[Layer] = (), followed: Followed | None = None) -> None:
        super().__init__(layers)
        self.followed = followed
        self.uses = find_uses(followed or Followed())


def largest_first(layers: Iterable[Layer]) -> list[Layer]:
    """The layers from the largest: begun last, it would keep one thread at work after all others have finished."""
    return sorted(layers, key=lambda layer: -math.prod(layer.shape))
