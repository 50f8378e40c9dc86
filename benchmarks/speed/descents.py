"""Times of convsim-init's own descent: a step, and all steps to a target, of a layer and of a network."""

from __future__ import annotations

import math
import time
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor

import convsim_init as ci
from benchmarks.speed.peers import TARGET
from benchmarks.speed.shapes import Shapes, draw, state_dict
from convsim_init.functional.bank import filter_bank
from convsim_init.optim.descent import descend
from convsim_init.parallel.threads import Team
from convsim_init.settings import Settings

FEW_STEPS, MANY_STEPS = 4, 14  # few enough for 1×1 layers to take them all
TIMES = 3  # medians of so many are subtracted
MOST_STEPS = 100


def time_step(weight: Tensor) -> float:
    """Seconds a step takes of one layer, all threads at work on its blocks: the median from the second step on."""
    bank, starts = filter_bank(weight), list[float]()
    with Team(torch.get_num_threads()) as team:
        descend(
            bank,
            Settings(steps=MANY_STEPS, tolerance=0),
            team=team,
            on_step=lambda: starts.append(time.perf_counter()),
        )
    _check({len(starts)}, MANY_STEPS)
    return median(later - earlier for earlier, later in pairwise(starts[1:]))


def time_network_step(shapes: Shapes) -> float:
    """Seconds a step takes of all layers, as `initialize_` shares them out among the threads.

    What further steps take, so without the set-up of the first.
    """
    weights = state_dict(shapes)

    def steps_taken(settings: Settings) -> set[int]:
        copies = {name: weight.clone() for name, weight in weights.items()}
        return {layer.steps for layer in ci.initialize_(copies, settings=settings).layers}

    def seconds(steps: int) -> float:
        settings = Settings(steps=steps, tolerance=0)
        started = time.perf_counter()
        taken = steps_taken(settings)
        spent = time.perf_counter() - started
        _check(taken, steps)
        return spent

    both = ((seconds(FEW_STEPS), seconds(MANY_STEPS)) for _ in range(TIMES))
    few, many = (median(times) for times in zip(*both, strict=True))
    return (many - few) / (MANY_STEPS - FEW_STEPS)


def _check(taken: set[int], steps: int) -> None:
    if taken != {steps}:
        raise RuntimeError(f"expected each layer to take {steps} steps, got {taken}: it would look fast")


def steps_to_target(weight: Tensor) -> int | None:
    """Steps until a tenth of the normalized similarity is left; None where many do not get there."""
    with Team(torch.get_num_threads()) as team:
        losses = descend(filter_bank(weight), Settings(steps=MOST_STEPS, tolerance=0), team=team).losses
    return next((step for step, loss in enumerate(losses) if loss <= TARGET * losses[0]), None)


def time_to_target(shapes: Shapes, steps: dict[tuple[int, ...], int]) -> float:
    """Seconds of all layers to the target, set-up included, each with as many steps as it needs.

    Args:
        shapes: Of the layers.
        steps: That a layer of the shape needs.
    """
    layers = [(filter_bank(draw(shape)), steps[shape]) for shape in sorted(shapes.elements(), key=math.prod)[::-1]]

    def lower(layer: tuple[Tensor, int]) -> None:
        bank, needed = layer
        descend(bank, Settings(steps=needed, tolerance=0))

    started = time.perf_counter()
    with Team(torch.get_num_threads()) as team:
        for _ in team.as_completed(lower, layers):
            pass
    return time.perf_counter() - started
