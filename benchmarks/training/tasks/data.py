"""What a task gives to training: images, labels, and how inputs are made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def unchanged(images: Tensor, generator: torch.Generator) -> Tensor:
    """The images as they are."""
    return images


@dataclass(frozen=True)
class Data:
    """Images and labels of a task.

    Attributes:
        images: What inputs for training are made of, `[N, C, H, W]`, in random order.
        labels: Their classes, `[N]`.
        test_images: Inputs for the test, `[N, C, H, W]`, of about zero mean and unit variance.
        test_labels: Their classes, `[N]`.
        classes: How many there are.
        augment: Makes inputs of training images, others each time that it is asked.
    """

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    augment: Callable[[Tensor, torch.Generator], Tensor] = unchanged


def standardized(images: Tensor, labels: Tensor, test_images: Tensor, test_labels: Tensor, classes: int) -> Data:
    """Inputs of zero mean and unit variance over the training set."""
    dimensions = (0, 2, 3)
    mean, deviation = images.mean(dimensions, keepdim=True), images.std(dimensions, keepdim=True)
    return Data((images - mean) / deviation, labels, (test_images - mean) / deviation, test_labels, classes)


def contrast_normalized(images: Tensor) -> Tensor:
    """Each image of zero mean and unit variance; one that is nearly flat, like a clear sky, stays nearly flat.

    The images range from 0 to 1. Their channels are seen as one, so that colours stay.
    """
    centred = images - images.mean((1, 2, 3), keepdim=True)
    return centred / (centred.std((1, 2, 3), keepdim=True) + 1e-2)
