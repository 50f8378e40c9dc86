"""One training run: a network, an arm, a learning rate and a seed; test accuracy along the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.training.arms import Arm
from benchmarks.training.snapshot import Snapshot
from benchmarks.training.starts import draw_base
from benchmarks.training.tasks.data import Data

POINTS = 10
WARM_UP = 0.1
STATISTICS = 256

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4),
    "adamw": partial(torch.optim.AdamW, weight_decay=0.05),
    "sgd-no-decay": partial(torch.optim.SGD, momentum=0.9, weight_decay=0),
    "sgd-no-momentum": partial(torch.optim.SGD, momentum=0, weight_decay=0),
}


def fit(
    data: Data,
    model: nn.Module,
    arm: Arm,
    *,
    draw: str,
    optimizer: str,
    rate: float,
    steps: int,
    batch: int,
    seed: int,
    snapshot: Snapshot | None = None,
) -> list[float]:
    """Train: the rate rises linearly over a tenth of the steps, then falls to zero as a cosine.

    Base draw, division of the data, batches and augmentations depend on the seed alone, so that arms can be compared
    in pairs. A snapshot of the run is taken up, and one is kept after each test but the last; it ends as it would have.

    Returns:
        Test accuracy, from 0 to 1, at `points` of the steps. Where the loss is no longer finite, training has ended and
        accuracy is that of guessing.
    """
    torch.manual_seed(seed)
    draw_base(model, draw)
    order, distortion = (torch.Generator().manual_seed(first + seed) for first in (20_000, 30_000))
    inputs = data.augment(data.images[:STATISTICS], distortion)
    torch.manual_seed(10_000 + seed)
    arm.start(model.train(), inputs)
    term = arm.term(model) if arm.term is not None else None
    algorithm = OPTIMIZERS[optimizer](decayed_apart(model), lr=rate)
    algorithm.param_groups[0]["weight_decay"] *= arm.decay
    batches, wanted = batches_of(len(data.images), batch, order), points(steps)
    accuracies = snapshot.restore(model, algorithm, distortion) if snapshot else []
    done = wanted[len(accuracies) - 1] if accuracies else 0
    for step in range(steps):
        chosen = next(batches).to(data.images.device)
        if step < done:
            continue
        for group in algorithm.param_groups:
            group["lr"] = rate * schedule(step / steps)
        loss = F.cross_entropy(model(data.augment(data.images[chosen], distortion)), data.labels[chosen])
        if term is not None and step < arm.until * steps:
            loss = loss + arm.weight * term()
        if not math.isfinite(loss.item()):
            break
        algorithm.zero_grad()
        loss.backward()
        algorithm.step()
        if step + 1 in wanted:
            accuracies.append(test_accuracy(model, data, inputs))
            if snapshot and step + 1 < steps:
                snapshot.save(model, algorithm, distortion, accuracies)
    return accuracies + [1 / data.classes] * (len(wanted) - len(accuracies))


def decayed_apart(model: nn.Module) -> list[dict[str, object]]:
    """Groups of parameters: weights, which decay; then scales and biases, which do not."""
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return [{"params": weights}, {"params": others, "weight_decay": 0.0}]


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
def test_accuracy(model: nn.Module, data: Data, inputs: Tensor) -> float:
    """Share of test images classified correctly, with batch norm's statistics over training inputs of the moment."""
    with current_statistics(model):
        model(inputs)
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
