"""Tasks that are learned in seconds: the images come with scikit-learn and scikit-image, or are drawn.

pip install scikit-learn scikit-image
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch

from benchmarks.training.tasks.data import Data, contrast_normalized, standardized


def digits(seed: int, train: int = 400, test: int = 800) -> Data:
    """scikit-learn's 8x8 digits, another division into training and test for each seed."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(found.target)))
    images = torch.tensor(found.images, dtype=torch.float32)[order, None]
    labels = torch.tensor(found.target)[order]
    until = train + test
    return standardized(images[:train], labels[:train], images[train:until], labels[train:until], classes=10)


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
        parts += [contrast_normalized(torch.from_numpy(np.stack(cut)).float()[:, None]), torch.from_numpy(labels)]
    return standardized(*parts, classes=len(sources))


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
    return standardized(images[:train], labels[:train], images[train:], labels[train:], classes=classes)


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
