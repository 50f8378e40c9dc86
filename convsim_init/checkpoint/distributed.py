"""Reading folders of `torch.distributed.checkpoint`, into which several processes wrote parts of tensors.

Torch's own reader unpickles ``.metadata``, and so runs what may be hidden in it; here its pickle is followed.
"""

from __future__ import annotations

import math
import mmap
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convsim_init.checkpoint.pickles import Made, PickleReader
from convsim_init.checkpoint.torch_files import TorchFile
from convsim_init.errors import InputError
from convsim_init.report.text import quoted

DEEP = 32  # dicts nested in each other, at most


def read_distributed(metadata: Path) -> tuple[dict[object, object], int]:
    """Read the folder of a file ``.metadata``: tensors, in the dicts that they were saved in, and its size in bytes.

    Raises:
        InputError: If a file is missing or holds anything but tensors.
        Exception: Any kind, if the folder is damaged or of another kind.
    """
    size = sum(file.stat().st_size for file in (metadata, *metadata.parent.glob("*.distcp")))
    with metadata.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        described: Any = PickleReader(str(metadata), content, size).load()
    parts: dict[str, list[tuple[tuple[int, ...], Any]]] = defaultdict(list)
    for index, place in described.state["storage_data"].items():
        parts[index.state["fqn"]].append((index.state.get("offset"), place.state))
    read = partial(_part, metadata.parent, {})
    tree: dict[object, object] = {}
    # Several entries may name one part: all of them together may take no more memory than the files.
    left = size
    for key, entry in described.state["state_dict_metadata"].items():
        value = entry
        if entry.maker.name == "TensorStorageMetadata":
            value = _whole(read, entry.state["size"], parts[key], left)
            left -= value.nbytes
        # Keys of nested dicts were joined, and their paths are listed; any other key is a path of one part.
        _put(tree, (described.state.get("planner_data") or {}).get(key, (key,)), value)
    return tree, size


def _whole(
    read: Callable[[Any], Tensor], shape: tuple[int, ...], parts: list[tuple[tuple[int, ...], Any]], left: int
) -> Tensor:
    """Assemble a tensor from parts, each after its offset in the whole; it may take as many bytes as are left."""
    first = read(parts[0][1])
    # Nothing is to be assembled: the tensor stays where it is.
    if len(parts) == 1 and first.shape == shape:
        return first
    if math.prod(shape) * first.dtype.itemsize > left:
        raise ValueError("a tensor that is larger than its parts")
    whole, filled = (torch.zeros(shape, dtype=dtype, device="cpu") for dtype in (first.dtype, torch.bool))
    for offset, place in parts:
        part = read(place)
        view, view_filled = (_within(tensor, offset, part.shape) for tensor in (whole, filled))
        if view_filled.any():
            raise ValueError("parts that overlap")
        view.copy_(part)
        view_filled.fill_(True)
    if not filled.all():
        raise ValueError("parts that are not the whole")
    return whole


def _within(whole: Tensor, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """The part of that shape at an offset; an error of any kind if it is not within the whole, or of another rank."""
    part = whole
    for dimension, (start, length, _) in enumerate(zip(offset, shape, whole.shape, strict=True)):
        part = part.narrow(dimension, start, length)
    return part


def _part(folder: Path, files: dict[str, TorchFile], place: Mapping[str, Any]) -> Tensor:
    name = place["relative_path"]
    path = folder / name
    # A name with a separator would lead out of the folder.
    if path.parent != folder or not path.is_file():
        raise InputError(
            f"expected the file {quoted(name)} beside {str(folder / '.metadata')!r}: copy the folder again"
        )
    if place.get("transform_descriptors"):
        raise InputError(
            f"expected plain tensors in {str(path)!r}, got compressed or encrypted ones: convert the folder with "
            f"dcp_to_torch_save of torch.distributed.checkpoint.format_utils"
        )
    file = files[name] = files.get(name) or TorchFile(path)
    tensor = file.read(place["offset"], place["length"])
    if not isinstance(tensor, Tensor) or tensor.nbytes > place["length"]:
        raise ValueError("a part that is no tensor")
    return tensor


def _put(tree: dict[object, object], path: tuple[object, ...], value: Tensor | Made) -> None:
    if len(path) > DEEP or not all(isinstance(part, (str, int)) for part in path):
        raise ValueError("a key that is no path")
    for part in path[:-1]:
        tree = tree.setdefault(part, {})  # type: ignore[assignment]
    tree[path[-1]] = value
