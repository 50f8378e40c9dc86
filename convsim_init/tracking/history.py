"""Recognizing weights by their values: those that were treated before, and copies that were not."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import ItemsView, Iterator, Sequence, ValuesView
from itertools import chain
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from convsim_init.functional.dtypes import converts
from convsim_init.layers.forward.isolation import holding_weights_lock
from convsim_init.layers.layer import Layer
from convsim_init.layers.memory import is_readable
from convsim_init.layers.obstacle import KEPT, Cause, Obstacle
from convsim_init.layers.symbolic.symbols import tensors_in
from convsim_init.layers.weights import KERNEL_RANKS
from convsim_init.report.report import Report
from convsim_init.report.text import layer_name, shown
from convsim_init.tracking.copies import copies_remark

Value = TypeVar("Value")
SAMPLES = 256  # sums of a weight's values with random signs, which nearly keep the distances between weights
MIN_VALUES = 16  # of a weight that is recognized by its direction, which smaller weights may share
DISTANCE = 5e-3  # relative to the norm: conversion to bfloat16 moves a weight by 2e-3, two steps of a descent by 3e-2


class Sample(NamedTuple):
    """The shape and some sums of a weight, by which it is recognized."""

    shape: tuple[int, ...]
    sums: Tensor


class SeenWeight(NamedTuple):
    """A weight that a report was about."""

    name: str  # of its layer and model
    address: int  # of its memory


class WeightIndex(defaultdict[tuple[int, ...], list[tuple[Value, Tensor]]]):
    """Values that are found by samples of weights: for each shape the values and the sums of their weights."""

    def __init__(self) -> None:
        super().__init__(list)

    def add(self, value: Value, sample: Sample | None) -> None:
        """Store a value for a weight, unless the weight could not be read."""
        if sample is not None:
            self[sample.shape].append((value, sample.sums))

    def find(self, sample: Sample | None) -> Value | None:
        """The first value stored for an equal weight; None if there is none or the weight is zero."""
        if sample is None or sample.shape not in self:
            return None
        values, sums = zip(*self[sample.shape], strict=True)
        stored = torch.stack(sums)
        equal = (stored - sample.sums).norm(dim=1) < DISTANCE * stored.norm(dim=1)
        # argmax does not take booleans.
        return values[int(equal.int().argmax())] if equal.any() else None


class History:
    """The weights that the reports of several models were about, before and after the layers were treated."""

    def __init__(self) -> None:
        self._before = WeightIndex[SeenWeight]()  # layers that were treated, as they were drawn
        self._obstacles = WeightIndex[Obstacle]()  # why to skip layers, by the directions of their weights
        self._kept = WeightIndex[SeenWeight]()  # layers that were left for a cause in KEPT
        self._optimized = WeightIndex[SeenWeight]()  # what the latest optimizer gets

    def obstacle(self, layer: Layer) -> Obstacle | None:
        """Reason to skip a weight already treated, or deliberately left, here or in another model that shares it.

        The scale of the weight does not matter, because `calibrate_` may have changed it since.
        """
        return self._obstacles.find(_direction(sample_layer(layer))) if self._obstacles else None

    def began_with(self, layer: Layer) -> bool:
        """Whether the layer's weight is the initial weight of a layer that was treated."""
        return self._before.find(sample_layer(layer)) is not None

    def watch(self, parameters: object) -> None:
        """Let remarks name those that are copies of weights among the parameters of an optimizer that is being made."""
        self._optimized = WeightIndex()
        # Nothing is found in an iterator, which is for the optimizer: it is nearly always `model.parameters()`.
        found = tensors_in(list(parameters) if isinstance(parameters, (ItemsView, ValuesView)) else parameters)
        for index, tensor in enumerate(found):
            if is_readable(tensor) and tensor.is_floating_point() and converts(tensor.dtype):
                seen = SeenWeight(f"parameter {index} of the optimizer", tensor.data_ptr())
                # `torch.func.stack_module_state` stacks the weights of an ensemble's members; its tensors are plain.
                stacks = [tensor[None]] if isinstance(tensor, nn.Parameter) else [tensor[None], tensor]
                for sample in chain.from_iterable(_samples(s) for s in stacks if s.dim() - 1 in KERNEL_RANKS):
                    self._optimized.add(seen, sample)

    def note(
        self,
        model_name: str,
        layers: Sequence[Layer],
        samples: Sequence[Sample | None],
        report: Report,
        *,
        chosen: bool = False,
    ) -> list[str]:
        """Record what a report says of the layers of a model, whose samples were taken before they were treated.

        If `chosen`, layers that were not selected are skipped from now on. The result is a remark on copies in other
        models that are no longer equal, or nothing.
        """
        new, parted = [], []
        for layer, sample, layer_report in zip(layers, samples, report.layers, strict=True):
            address = layer.weight.sources[0].data_ptr() if sample is not None else 0
            seen = SeenWeight(f"{layer_name(layer.name)} of {shown(model_name)}", address)
            if layer_report.after:
                new.append((self._before, seen, sample))
                self._obstacles.add(_seen_before("treated", seen), _direction(sample_layer(layer)))
                parted += [(twin, seen)] if (twin := self._kept.find(sample)) else []
                # The optimizer's may be what the weight is computed from, such as the direction of weight_norm.
                own = {source.data_ptr() for source in layer.weight.sources}
                trained = self._optimized.find(sample)
                parted += [(trained, seen)] if trained and trained.address not in own else []
            elif layer.obstacle is None:
                self._obstacles.add(_seen_before("left as it was", seen), _direction(sample_layer(layer)))
            elif layer.obstacle.cause is Cause.UNSELECTED and chosen:
                obstacle = _seen_before(layer.obstacle.text, seen, Cause.UNSELECTED_BEFORE)
                self._obstacles.add(obstacle, _direction(sample))
            elif layer.is_left_for(*KEPT):
                new.append((self._kept, seen, sample))
                parted += [(seen, twin)] if (twin := self._before.find(sample)) else []
        # Only now, because `watch_copies` remarks on copies within the model.
        for index, seen, sample in new:
            index.add(seen, sample)
        # At the same address it is the same weight, which was frozen at one time.
        pairs = [(copy.name, original.name) for copy, original in parted if copy.address != original.address]
        return copies_remark(pairs)


open_histories: list[History] = []  # of the `initializing` contexts that are open


def _seen_before(text: str, seen: SeenWeight, cause: Cause = Cause.UNTREATABLE) -> Obstacle:
    """The obstacle of a weight that was seen before, with what became of it then."""
    return Obstacle(f"{text} before, as {seen.name}", cause, seen.name)


def sample_layer(layer: Layer) -> Sample | None:
    """The sample of a layer's weight; None where it cannot be read."""
    if layer.weight.obstacle(read_only=True) is not None:
        return None
    with holding_weights_lock():
        return next(_samples(layer.weight.read()[None]))


@torch.no_grad()
def _samples(weights: Tensor) -> Iterator[Sample]:
    """Samples of the weights in a stack ``[N, *shape]``."""
    values = weights.flatten(1).float().cpu()
    rows = torch.unflatten(nn.functional.pad(values, (0, -values.shape[1] % SAMPLES)), 1, (SAMPLES, -1))
    # The same signs for all weights of a shape make their sums comparable.
    signs = torch.randint(2, (rows.shape[2],), generator=torch.Generator().manual_seed(0), device="cpu") * 2 - 1
    return (Sample(tuple(weights.shape[1:]), sums) for sums in rows @ signs.to(rows))


def _direction(sample: Sample | None) -> Sample | None:
    """The sample scaled to norm 1, except that of a weight with very few values."""
    if sample is None or math.prod(sample.shape) < MIN_VALUES:
        return sample
    return sample._replace(sums=nn.functional.normalize(sample.sums, dim=0))
