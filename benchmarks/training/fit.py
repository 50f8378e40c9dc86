"""One training run: a network, an arm, a learning rate and a seed; test accuracy along the way."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convsim_init as ci
from benchmarks.training.arms import Arm, draw_base
from benchmarks.training.tasks import Data

POINTS = 10
WARM_UP = 0.1
STATISTICS = 256


def fit(
    data: Data, model: nn.Module, arm: Arm, *, rate: float, momentum: float, steps: int, batch: int, seed: int
) -> list[float]:
    """Train by SGD: the rate rises linearly over a tenth of the steps, then falls to zero as a cosine.

    Base draw, division of the data and batches depend on the seed alone, so that arms can be compared in pairs.

    Returns:
        Test accuracy, from 0 to 1, at `points` of the steps. Where the loss is no longer finite, training has ended and
        accuracy is that of guessing.
    """
    torch.manual_seed(seed)
    draw_base(model)
    torch.manual_seed(10_000 + seed)
    arm.start(model.train(), data.images)
    term = ci.ConvolutionalSimilarity(model, normalized=arm.normalized) if arm.penalty else None
    order = torch.Generator().manual_seed(20_000 + seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    accuracies, batches, wanted = [], batches_of(len(data.images), batch, order), points(steps)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * schedule(step / steps)
        chosen = next(batches).to(data.images.device)
        loss = F.cross_entropy(model(data.images[chosen]), data.labels[chosen])
        if term is not None:
            loss = loss + arm.penalty * term()
        if not math.isfinite(loss.item()):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step + 1 in wanted:
            accuracies.append(test_accuracy(model, data))
    return accuracies + [1 / data.classes] * (len(wanted) - len(accuracies))


def points(steps: int) -> list[int]:
    """The steps after which the network is tested: denser at first."""
    return sorted({max(1, round(steps * ((index + 1) / POINTS) ** 1.5)) for index in range(POINTS)})


def schedule(done: float) -> float:
    """The learning rate over its peak, after a share of the steps."""
    if done < WARM_UP:
        return done / WARM_UP + 0.01
    return (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))) / 2


def batches_of(images: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of epoch after epoch; the last one of an epoch is left out if it is smaller."""
    while True:
        order = torch.randperm(images, generator=generator)
        yield from order[: images // size * size].split(size)


@torch.no_grad()
def test_accuracy(model: nn.Module, data: Data) -> float:
    """Share of test images classified correctly, with batch norm's statistics over training images of the moment."""
    with current_statistics(model):
        model(data.images[:STATISTICS])
    model.eval()
    right = sum(
        int((model(images).argmax(1) == labels).sum())
        for images, labels in zip(data.test_images.split(512), data.test_labels.split(512), strict=True)
    )
    model.train()
    return right / len(data.test_labels)


@contextmanager
def current_statistics(model: nn.Module) -> Iterator[None]:
    """Context in which a forward pass leaves its own statistics in batch norm, with nothing of those before."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    yield
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
