"""Weights that are recognized by their values: those that were treated before, and copies that were not."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from convsim_init.layers.forward.isolation import holding_weights_lock
from convsim_init.layers.layer import Layer
from convsim_init.layers.obstacle import KEPT, Cause, Obstacle
from convsim_init.layers.remarks import copies_remark
from convsim_init.report.report import Report
from convsim_init.report.text import layer_name, shown

Fact = TypeVar("Fact")
SAMPLES = 256  # sums of a weight's values with random signs, by which it is recognized: distances are nearly kept
FEW = 16  # values, of which several weights may have the same direction
DISTANCE = 5e-3  # part of their norm: bfloat16 changes 2e-3, two steps of a descent 3e-2


class Sample(NamedTuple):
    """What a weight is recognized by."""

    shape: tuple[int, ...]
    sums: Tensor


class Named(NamedTuple):
    """A weight of a model."""

    name: str  # of its layer, and of the model
    memory: int  # address of what it is stored in


class Known(defaultdict[tuple[int, ...], list[tuple[Fact, Tensor]]]):
    """What is known of weights, by their samples: facts and sums, by shape."""

    def __init__(self) -> None:
        super().__init__(list)

    def add(self, fact: Fact, sample: Sample | None) -> None:
        """Know a fact of a weight; nothing of one that could not be read."""
        if sample is not None:
            self[sample.shape].append((fact, sample.sums))

    def find(self, sample: Sample | None) -> Fact | None:
        """What is known of the weight that has these values; None if there is none, or they are zeros."""
        if sample is None or sample.shape not in self:
            return None
        facts, sums = zip(*self[sample.shape], strict=True)
        known = torch.stack(sums)
        alike = (known - sample.sums).norm(dim=1) < DISTANCE * known.norm(dim=1)
        # The first that is alike; of booleans there is no argmax.
        return facts[int(alike.int().argmax())] if alike.any() else None


class History:
    """What the layers of several models held before and after they were treated, or while they were left alone."""

    def __init__(self) -> None:
        self._before = Known[Named]()
        self._after = Known[Obstacle]()  # directions alone, by why their layers are to be left
        self._left = Known[Named]()  # frozen or loaded

    def obstacle(self, layer: Layer) -> Obstacle | None:
        """That its weight was treated, or chosen to be left, in this model or in another one that has it too.

        It is recognized at another scale too, because `calibrate_` may have scaled it since.
        """
        return self._after.find(_direction(sample_layer(layer))) if self._after else None

    def began_with(self, layer: Layer) -> bool:
        """Whether its weight is what some layer was drawn with that was treated."""
        return self._before.find(sample_layer(layer)) is not None

    def note(
        self,
        model: str,
        layers: Sequence[Layer],
        before: Sequence[Sample | None],
        report: Report,
        *,
        chosen: bool = False,
    ) -> list[str]:
        """Note what a report says of the layers of a model, of which samples were taken before they were treated.

        Those that were not selected are to be left from now on if that was `chosen`. Returned is a remark on copies in
        other models that are no longer equal.
        """
        treated, left, parted = [], [], []
        for layer, sample, outcome in zip(layers, before, report.layers, strict=True):
            memory = layer.weight.sources[0].data_ptr() if sample is not None else 0
            own = Named(f"{layer_name(layer.name)} of {shown(model)}", memory)
            if outcome.after:
                treated.append((own, sample))
                self._after.add(_before("treated", own), _direction(sample_layer(layer)))
                parted += [(twin, own)] if (twin := self._left.find(sample)) else []
            elif layer.obstacle is None:
                self._after.add(_before("left as it was", own), _direction(sample_layer(layer)))
            elif layer.obstacle.cause is Cause.UNSELECTED and chosen:
                obstacle = _before(layer.obstacle.text, own, Cause.UNSELECTED_BEFORE)
                self._after.add(obstacle, _direction(sample))
            elif layer.is_left_for(*KEPT):
                left.append((own, sample))
                parted += [(own, twin)] if (twin := self._before.find(sample)) else []
        for known, new in ((self._before, treated), (self._left, left)):  # copies within the model are not parted
            for own, sample in new:
                known.add(own, sample)
        return copies_remark([(a.name, b.name) for a, b in parted if a.memory != b.memory])  # else it was frozen then


HISTORIES: list[History] = []  # of the contexts of `initializing` that are open


def _before(text: str, seen: Named, cause: Cause = Cause.UNTREATABLE) -> Obstacle:
    """That the same happened to the weight before, where it was seen."""
    return Obstacle(f"{text} before, as {seen.name}", cause, seen.name)


def sample_layer(layer: Layer) -> Sample | None:
    """Some sums of a layer's weight; None where it cannot be read."""
    if layer.weight.obstacle(read_only=True) is not None:
        return None
    with holding_weights_lock():
        values = layer.weight.read().flatten().float().cpu()
    rows = nn.functional.pad(values, (0, -len(values) % SAMPLES)).view(SAMPLES, -1)
    # The same signs for all weights of a shape, whose sums would not be comparable otherwise.
    signs = torch.randint(2, (rows.shape[1],), generator=torch.Generator().manual_seed(0), device="cpu") * 2 - 1
    return Sample(tuple(layer.shape), rows @ signs.to(rows))


def _direction(sample: Sample | None) -> Sample | None:
    """The same for all multiples of a weight, but for very small ones."""
    if sample is None or math.prod(sample.shape) < FEW:
        return sample
    return sample._replace(sums=nn.functional.normalize(sample.sums, dim=0))
