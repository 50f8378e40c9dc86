"""Reading the tensors of a checkpoint, whoever wrote it, without running what may be hidden in it."""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections import Counter, OrderedDict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from convsim_init.checkpoint.state_dict import module_versions
from convsim_init.checkpoint.vetting import is_zipped, vet_torch_file
from convsim_init.errors import InputError
from convsim_init.files import TORCH_SUFFIXES, check_source
from convsim_init.layers.names import bare_entries
from convsim_init.report.text import quoted

WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema")


class Checkpoint(NamedTuple):
    """The tensors of a file under its own keys.

    Attributes:
        tensors: Dense tensors on the CPU.
        wrapper: Key that the file keeps them under, such as ``"state_dict"``; empty if under nothing.
        versions: Notes of the modules that `torch.save` kept, see `module_versions`.
    """

    tensors: dict[str, Tensor]
    wrapper: str
    versions: OrderedDict[str, object] | None = None


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, as of `read_checkpoint`, under keys without what wrappers add to them.

    Raises:
        InputError: If the file is missing, damaged, holds anything but tensors, or two keys are then the same.
    """
    tensors = read_checkpoint(path).tensors
    try:
        return {key: value for key, value in bare_entries(tensors).items() if isinstance(value, Tensor)}
    except InputError as error:
        raise InputError(f"{str(path)!r}: {error}") from error


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The tensors of a checkpoint, on the CPU, under the keys that they have there.

    A dict that holds the state dict under ``state_dict``, ``model``, ``model_state_dict`` or ``state_dict_ema`` is
    opened: the first of these that is there. Files of `torch.save` are read with ``weights_only=True``, always: no
    code in them is run. Their tensors stay on the disk until they are used.

    Args:
        path: Ends in ``.safetensors``, or in ``.pt`` or ``.pth`` for a file of `torch.save`.

    Returns:
        Dense tensors, at least one, in the order of the file.

    Raises:
        InputError: If the file is missing, damaged, or holds anything but tensors.
    """
    source = check_source(path)
    name = repr(str(source))
    try:
        content = _read_torch(source) if source.suffix in TORCH_SUFFIXES else _read_safetensors(source)
    except InputError:
        raise
    except Exception as error:  # whatever these libraries and the system raise at what they cannot read
        raise InputError(_explain(name, source, error)) from error
    return _checked(name, content, source.stat().st_size)


def _read_torch(path: Path) -> object:
    vet_torch_file(path)
    with warnings.catch_warnings():  # about what the error will tell, or about nothing of ours
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipped(path))


def _read_safetensors(path: Path) -> object:
    tensors = safetensors.torch.load_file(path)
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    json.loads(header, object_pairs_hook=partial(_only_once, str(path)))  # of a key that is there twice, one is lost
    return tensors


def _only_once(path: str, pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise InputError(f"expected each key once, got {path!r}, whose header repeats {quoted(twice)}: write it again")
    return entries


def _explain(name: str, path: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.errno != errno.EINVAL:  # torch's, at a cut archive
        return f"cannot read {name}: {error.strerror}; check the file"
    writer = "torch.save" if path.suffix in TORCH_SUFFIXES else "safetensors"
    return f"expected a file written by {writer}, got {name}, which is damaged or of another kind: copy it again"


def _checked(name: str, content: object, size: int) -> Checkpoint:
    inner, opened = _unwrapped(content)
    place = f" under {opened!r}" if opened else ""
    if not isinstance(inner, Mapping):
        raise InputError(
            f"expected a state dict in {name}, got {type(inner).__name__}{place}: save the model's state_dict()"
        )
    if not inner:
        raise InputError(f"expected weights in {name}, got an empty state dict{place}: save the model's state_dict()")
    for key, value in inner.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            what = f"{type(value).__name__} under {quoted(key)}"
            raise InputError(f"expected only tensors in {name}, got {what}{place}: save the model's state_dict()")
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            what = f"a sparse, quantized or empty one under {quoted(key)}{place}"
            raise InputError(f"expected dense tensors in {name}, got {what}: convert it and save it again")
        # One row that stands for a million, or memory that the file names and does not fill.
        if max(value.nbytes, value.untyped_storage().nbytes()) > size:
            what = f"shape {list(value.shape)} under {quoted(key)}{place}"
            raise InputError(f"expected tensors no larger than the file in {name}, got {what}: copy the file again")
    return Checkpoint(dict(inner), opened, module_versions(inner))


def _unwrapped(content: object) -> tuple[object, str]:
    """The innermost state dict, and the names of what it was in, joined by dots."""
    opened: list[str] = []
    while isinstance(content, Mapping) and len(opened) < len(WRAPPERS):
        wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if wrapper is None:
            break
        content = content[wrapper]
        opened.append(wrapper)
    return content, ".".join(opened)
