"""Image classification tasks that need no download.

A task draws its own training and test images for every seed, so that results vary with the data as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.training.tasks.cifar import cifar
from benchmarks.training.tasks.data import Data
from benchmarks.training.tasks.glyphs import glyphs
from benchmarks.training.tasks.photos import photos
from benchmarks.training.tasks.small import digits, patches, textures


@dataclass(frozen=True)
class Task:
    """Where images come from, and how long to train on them.

    Attributes:
        draw: Makes the data of a seed.
        steps: Steps of training, by default.
        batch: Images in a step.
    """

    draw: Callable[[int], Data]
    steps: int
    batch: int


TASKS = {
    "digits": Task(digits, steps=78, batch=32),
    "patches": Task(patches, steps=190, batch=64),
    "textures": Task(textures, steps=140, batch=64),
    "photos": Task(photos, steps=1500, batch=64),
    "colour-photos": Task(partial(photos, mode="RGB"), steps=1500, batch=64),
    "glyphs": Task(glyphs, steps=1500, batch=64),
}


def cifar_task(folder: Path) -> Task:
    """CIFAR from a folder, for 10 epochs."""
    return Task(partial(cifar, folder=folder), steps=3900, batch=128)
