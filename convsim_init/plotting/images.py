"""Small pictures of each layer as PNG files, for a page of HTML; without matplotlib."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from convsim_init.metrics.snapshot import Snapshot
from convsim_init.plotting.panels import Array, correlations, mosaic, tiles

MAX_MAPS = 64  # feature maps whose correlations are shown
BLUE = (0.0, 0.45, 0.7)


def layer_images(before: Snapshot, after: Snapshot, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Pictures of each layer's filters and of the correlations of its feature maps, as data URLs by caption."""
    images: dict[str, dict[str, str]] = {}
    for name in names:
        banks = {snapshot.label: snapshot.banks[name] for snapshot in (before, after)}
        filters = {label: tiles(bank) for label, bank in banks.items()}
        matrices = {label: correlations(bank)[:MAX_MAPS, :MAX_MAPS] for label, bank in banks.items()}
        largest = max(float(np.abs(stack).max()) for stack in filters.values()) or 1.0
        highest = max(float(np.nan_to_num(matrix).max()) for matrix in matrices.values()) or 1.0
        shown = {f"filters {label}": mosaic(0.5 + 0.5 * stack / largest) for label, stack in filters.items()}
        shown |= {f"correlations {label}": _tinted(matrix / highest) for label, matrix in matrices.items()}
        images[name] = {caption: png(image) for caption, image in shown.items()}
    return images


def png(image: Array) -> str:
    """The data URL of an image ``[height, width, 4]`` of red, green, blue and opacity from 0 to 1."""
    pixels = (image.clip(0, 1) * 255).round().astype(np.uint8)
    height, width, _ = pixels.shape
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)  # 0: the bytes are as they are
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)  # 8 bits each, 6: red, green, blue, opacity
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    data = b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + data).decode()


def _tinted(matrix: Array) -> Array:
    """An image of blue, opaque where the matrix is 1 and transparent where it is 0 or NaN."""
    opacity = np.nan_to_num(matrix)[..., None]
    colour: np.ndarray[Any, Any] = np.broadcast_to(BLUE, (*matrix.shape, 3))
    return np.concatenate([colour, opacity], axis=2)
