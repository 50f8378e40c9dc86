"""CIFAR-10 and CIFAR-100 in their binary format, from a folder that already has them: nothing is downloaded.

A record is one label byte (CIFAR-100: two, of which the second is the fine class), then 3 x 32 x 32 bytes of an image.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import convsim_init as ci
from benchmarks.training.tasks.data import Data, standardized

PIXELS = 3 * 32 * 32
TEN = ([f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"], 1)
HUNDRED = (["train.bin"], ["test.bin"], 2)


def cifar(seed: int, folder: Path, train: int | None = None) -> Data:
    """CIFAR-10 or CIFAR-100 from a folder; all of it, or a part of its training images, another one for each seed."""
    images, labels, test_images, test_labels = map(torch.from_numpy, read_cifar(folder))
    chosen = torch.from_numpy(np.random.default_rng(seed).permutation(len(images)))[:train]
    return standardized(
        images[chosen].float(),
        labels[chosen].long(),
        test_images.float(),
        test_labels.long(),
        classes=int(labels.max()) + 1,
    )


def read_cifar(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images and labels, then those of the test.

    Returns:
        Images ``[N, 3, 32, 32]`` and labels ``[N]``, uint8 each.

    Raises:
        ci.InputError: If the folder holds neither set whole, or a file ends within a record.
    """
    for training, test, labels in (TEN, HUNDRED):
        if all((folder / name).is_file() for name in (*training, *test)):
            parts = [[_read(folder / name, labels) for name in names] for names in (training, test)]
            return tuple(np.concatenate(arrays) for part in parts for arrays in zip(*part, strict=True))  # type: ignore
    raise ci.InputError(
        f"expected CIFAR's binary files in {folder} ({TEN[0][0]} to {TEN[0][-1]} and {TEN[1][0]}, or {HUNDRED[0][0]} "
        f"and {HUNDRED[1][0]}), found {', '.join(sorted(p.name for p in folder.glob('*.bin'))) or 'none of them'}"
    )


def _read(path: Path, labels: int) -> tuple[np.ndarray, np.ndarray]:
    values = np.fromfile(path, dtype=np.uint8)
    if values.size == 0 or values.size % (labels + PIXELS):
        raise ci.InputError(f"expected {path} to hold records of {labels + PIXELS} bytes, got {values.size} bytes")
    records = values.reshape(-1, labels + PIXELS)
    return records[:, labels:].reshape(-1, 3, 32, 32), records[:, labels - 1]
