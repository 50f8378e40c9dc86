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
        about: A sentence on it.
    """

    draw: Callable[[int], Data]
    steps: int
    batch: int
    about: str


TASKS = {
    "digits": Task(digits, steps=78, batch=32, about="scikit-learn's digits, 8×8, 10 classes, 400 training images"),
    "patches": Task(
        patches,
        steps=190,
        batch=64,
        about="16×16 grey patches of 16 photographs, classified by source, 2400 training patches from the left halves, "
        "test patches from the right halves",
    ),
    "textures": Task(
        textures, steps=140, batch=64, about="16×16 noise of 12 orientations within noise, 1500 training images"
    ),
    "photos": Task(
        photos,
        steps=1500,
        batch=64,
        about="16×16 grey patches of 44 photographs, classified by source, crops of 7,888 cells, 10,000 test patches",
    ),
    "glyphs": Task(
        glyphs,
        steps=1500,
        batch=64,
        about="16×16 characters of 47 classes in noise, fresh distortions, 10,000 test images of other fonts",
    ),
}


def cifar_task(folder: Path) -> Task:
    """CIFAR from a folder, for 10 epochs."""
    return Task(partial(cifar, folder=folder), steps=3900, batch=128, about=f"CIFAR from {folder.name}")
