"""Reading the tensors of a checkpoint, whoever wrote it, without running what may be hidden in it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from convsim_init.errors import InputError
from convsim_init.files import TORCH_SUFFIXES, check_source
from convsim_init.state_dict import bare_entries
from convsim_init.vetting import is_zipped, vet_torch_file

WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema")


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, on the CPU.

    A dict that holds the state dict under ``state_dict``, ``model``, ``model_state_dict`` or ``state_dict_ema`` is
    opened: the first of these that is there. What DistributedDataParallel and torch.compile add to the keys is taken
    off. Files of `torch.save` are read with ``weights_only=True``, always: no code in them is run. Their tensors stay
    on the disk until they are used.

    Args:
        path: Ends in ``.safetensors``, or in ``.pt`` or ``.pth`` for a file of `torch.save`.

    Returns:
        Dense tensors by key, at least one, in the order of the file.

    Raises:
        InputError: If the file is missing, damaged, or holds anything but tensors.
    """
    source = check_source(path)
    name = repr(str(source))
    try:
        content = _read_torch(source) if source.suffix in TORCH_SUFFIXES else safetensors.torch.load_file(source)
    except InputError:
        raise
    except Exception as error:  # whatever these libraries and the system raise at what they cannot read
        raise InputError(_explain(name, source, error)) from error
    return _tensors(name, content, source.stat().st_size)


def _read_torch(path: Path) -> object:
    vet_torch_file(path)
    with warnings.catch_warnings():  # about what the error will tell, or about nothing of ours
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipped(path))


def _explain(name: str, path: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot read {name}: {error.strerror}; check the file"
    writer = "torch.save" if path.suffix in TORCH_SUFFIXES else "safetensors"
    return f"expected a file written by {writer}, got {name}, which is damaged or of another kind: copy it again"


def _tensors(name: str, content: object, size: int) -> dict[str, Tensor]:
    inner, place = _unwrapped(content)
    if not isinstance(inner, Mapping):
        raise InputError(
            f"expected a state dict in {name}, got {type(inner).__name__}{place}: save the model's state_dict()"
        )
    if not inner:
        raise InputError(f"expected weights in {name}, got an empty state dict{place}: save the model's state_dict()")
    for key, value in inner.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            what = f"{type(value).__name__} under {_short(key)}"
            raise InputError(f"expected only tensors in {name}, got {what}{place}: save the model's state_dict()")
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            what = f"a sparse, quantized or empty one under {_short(key)}{place}"
            raise InputError(f"expected dense tensors in {name}, got {what}: convert it and save it again")
        # One row that stands for a million, or memory that the file names and does not fill.
        if max(value.nbytes, value.untyped_storage().nbytes()) > size:
            what = f"shape {list(value.shape)} under {_short(key)}{place}"
            raise InputError(f"expected tensors no larger than the file in {name}, got {what}: copy the file again")
    tensors = {key: value for key, value in bare_entries(inner).items() if isinstance(value, Tensor)}
    if len(tensors) < len(inner):
        raise InputError(
            f"expected the keys of {name} to differ in more than '_orig_mod', got {len(inner)} keys for "
            f"{len(tensors)} tensors: save the unwrapped model's state_dict()"
        )
    return tensors


def _unwrapped(content: object) -> tuple[object, str]:
    """The innermost state dict, and words for where it was."""
    opened: list[str] = []
    while isinstance(content, Mapping) and len(opened) < len(WRAPPERS):
        wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if wrapper is None:
            break
        content = content[wrapper]
        opened.append(wrapper)
    return content, f" under {'.'.join(opened)!r}" if opened else ""


def _short(key: object) -> str:
    text = repr(key)
    return text if len(text) <= 80 else text[:77] + "..."
