"""Image classification tasks that need no download: the images come with scikit-learn and scikit-image, or are drawn.

    pip install scikit-learn scikit-image

A task draws its own training and test images for every seed, so that results vary with the data as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.training.cifar import read_cifar


@dataclass(frozen=True)
class Data:
    """Images ``[N, C, H, W]`` of zero mean and unit variance over the training set, and their labels ``[N]``."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int


@dataclass(frozen=True)
class Task:
    """Where images come from, and how long to train on them.

    Attributes:
        draw: Makes the data of a seed.
        steps: Of training, by default.
        batch: Images a step.
        about: In a sentence.
    """

    draw: Callable[[int], Data]
    steps: int
    batch: int
    about: str


def digits(seed: int, train: int = 400, test: int = 800) -> Data:
    """scikit-learn's 8x8 digits, another division into training and test for each seed."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(found.target)))
    images = torch.tensor(found.images, dtype=torch.float32)[order, None]
    labels = torch.tensor(found.target)[order]
    until = train + test
    return _standardized(images[:train], labels[:train], images[train:until], labels[train:until], classes=10)


def patches(seed: int, train: int = 2400, test: int = 800, size: int = 16) -> Data:
    """Which image is this patch from? Grey patches, training from the left half of each image, test from the right.

    Each patch has zero mean and unit variance, so that neither brightness nor contrast tells its source.
    """
    rng = np.random.default_rng(seed)
    sources = _grey_images()
    parts = []
    for count, right in ((train, False), (test, True)):
        labels = np.arange(count) % len(sources)
        cut = []
        for label in labels:
            image = sources[label]
            middle = image.shape[1] // 2
            half = image[:, middle:] if right else image[:, :middle]
            top, left = (rng.integers(side - size + 1) for side in half.shape)
            cut.append(half[top : top + size, left : left + size])
        images = torch.from_numpy(np.stack(cut)).float()[:, None]
        images -= images.mean((2, 3), keepdim=True)
        images /= images.std((2, 3), keepdim=True) + 1e-2  # of a range of 1: flat sky stays nearly flat
        parts += [images, torch.from_numpy(labels)]
    return _standardized(*parts, classes=len(sources))


def textures(seed: int, train: int = 1500, test: int = 800, size: int = 16, noise: float = 1.0) -> Data:
    """Which way does it run? Noise of one of 12 orientations, in noise of all orientations, both of spectrum 1/f^2."""
    classes = 12
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(train + test) % classes
    frequencies = torch.fft.fftfreq(size)
    vertical, horizontal = torch.meshgrid(frequencies, frequencies, indexing="ij")
    radius = (vertical.square() + horizontal.square()).sqrt()
    amplitude = torch.where(radius > 0, 1 / radius.clamp(min=1 / size), 0)
    angle = torch.atan2(vertical, horizontal)
    centres = labels * (math.pi / classes) + 0.1 * torch.randn(len(labels), generator=generator)
    along = torch.cos(2 * (angle - centres[:, None, None]))  # 1 along the orientation, also after half a turn
    oriented = amplitude * torch.exp(6 * (along - 1))
    drawn = [torch.randn(len(labels), size, size, generator=generator) for _ in range(2)]
    filtered = [torch.fft.fft2(d) * a for d, a in zip(drawn, (oriented, amplitude), strict=True)]
    texture, other = (torch.fft.ifft2(spectrum).real for spectrum in filtered)
    images = texture / texture.std((1, 2), keepdim=True) + noise * other / other.std((1, 2), keepdim=True)
    images = images[:, None]
    return _standardized(images[:train], labels[:train], images[train:], labels[train:], classes=classes)


def cifar(seed: int, folder: Path, train: int | None = None) -> Data:
    """CIFAR-10 or CIFAR-100 from a folder; all of it, or a part of its training images, another one for each seed."""
    images, labels, test_images, test_labels = map(torch.from_numpy, read_cifar(folder))
    chosen = torch.from_numpy(np.random.default_rng(seed).permutation(len(images)))[:train]
    return _standardized(
        images[chosen].float(),
        labels[chosen].long(),
        test_images.float(),
        test_labels.long(),
        classes=int(labels.max()) + 1,
    )


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
}


def cifar_task(folder: Path) -> Task:
    """CIFAR from a folder, for 10 epochs."""
    return Task(partial(cifar, folder=folder), steps=3900, batch=128, about=f"CIFAR from {folder.name}")


@lru_cache(maxsize=1)
def _grey_images() -> list[np.ndarray]:
    """Photographs in the wheels of scikit-learn and scikit-image, grey, from 0 to 1."""
    from skimage import data as wheel
    from sklearn.datasets import load_sample_images

    names = ("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field")
    names += ("immunohistochemistry", "moon", "page", "rocket", "retina")
    images = [getattr(wheel, name)() for name in names] + load_sample_images().images
    grey = [image @ np.array([0.299, 0.587, 0.114]) if image.ndim == 3 else image for image in images]
    return [np.asarray(image, dtype=np.float32) / 255 for image in grey]


def _standardized(images: Tensor, labels: Tensor, test_images: Tensor, test_labels: Tensor, classes: int) -> Data:
    dimensions = (0, 2, 3)
    mean, deviation = images.mean(dimensions, keepdim=True), images.std(dimensions, keepdim=True)
    return Data((images - mean) / deviation, labels, (test_images - mean) / deviation, test_labels, classes)
