"""Writing checkpoints that any training codebase loads: full state dicts, whole files or none, the same bytes each run.

Tensors are written by `safetensors` or `torch.save`; what is added here is the care around them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from convsim_init.errors import InputError
from convsim_init.files import TORCH_SUFFIXES, check_target, replacing
from convsim_init.layers import unwrap
from convsim_init.report import Report
from convsim_init.version import __version__

WRAPPER_PREFIXES = ("module.", "_orig_mod.")


def save_checkpoint(
    model_or_state_dict: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    report: Report | None = None,
    prefix: str = "",
    convs_only: bool = False,
    dtype: torch.dtype | None = torch.float32,
    overwrite: bool = False,
) -> Path:
    """Write a model's weights as a file that any training codebase loads.

    The file holds every entry of the state dict under its bare key (without the prefixes of DistributedDataParallel
    and torch.compile), contiguous; tied weights under each of their names. It appears whole or not at all, and the
    same arguments give the same bytes.

    Args:
        model_or_state_dict: What to write.
        path: Ends in ``.safetensors``, or in ``.pt`` or ``.pth`` for a file of `torch.save`, which has no metadata.
        report: Of the run that made the weights; its model, seed, settings and totals go into the metadata.
        prefix: Put before every key, for instance ``"model."``.
        convs_only: Write only the convolutions that the report says were changed; needs ``report``.
        dtype: Of the floating tensors; None keeps each one's own.
        overwrite: Replace an existing file.

    Returns:
        The path written.

    Raises:
        InputError: If the path cannot be written, or the weights hold other than finite tensors.
        RunError: If writing fails, for instance on a full disk; the file that was there is still there.
    """
    target = check_target(path, overwrite=overwrite)
    if isinstance(model_or_state_dict, nn.Module):
        state: Mapping[str, object] = unwrap(model_or_state_dict).state_dict()
    else:
        state = model_or_state_dict
    tensors = _collect(_bare(state), prefix, _changed(report) if convs_only else None, dtype)
    with replacing(target) as temporary:
        _write(tensors, temporary, None if target.suffix in TORCH_SUFFIXES else _metadata(report))
    return target


def _bare(state: Mapping[str, object]) -> dict[str, object]:
    bare = dict(state)
    while bare and (wrapper := next((p for p in WRAPPER_PREFIXES if all(k.startswith(p) for k in bare)), None)):
        bare = {key.removeprefix(wrapper): value for key, value in bare.items()}
    return bare


def _changed(report: Report | None) -> set[str]:
    if report is None:
        raise InputError("convs_only: expected the report that says which convolutions were changed, got none")
    return {f"{layer.name}.weight" for layer in report.layers if layer.after}


def _collect(
    state: Mapping[str, object], prefix: str, only: set[str] | None, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, value in state.items():
        if only is not None and key not in only:
            continue
        if not isinstance(value, Tensor):
            raise InputError(f"{key}: expected a tensor in the state dict, got {type(value).__name__}")
        tensor = value.detach()
        if tensor.is_meta:
            raise InputError(f"{key}: expected a tensor with data, got one on the meta device: initialize it first")
        if tensor.is_floating_point():
            if not tensor.isfinite().all():
                raise InputError(f"{key}: expected finite numbers, got infinities or NaN: nothing was written")
            tensor = tensor.to(dtype or tensor.dtype)
        tensor = tensor.cpu().contiguous()
        # Files hold no aliases: what shares memory with another entry, or with more than itself, is written apart.
        storage = tensor.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[prefix + key] = tensor
    if not tensors:
        raise InputError("expected weights to write, got none: no entry of the state dict is left")
    return tensors


def _metadata(report: Report | None) -> dict[str, str]:
    about: dict[str, object] = {"format_version": 1, "version": __version__}
    if report is not None:
        about |= {
            "model": report.model,
            "seed": report.seed,
            "settings": asdict(report.settings),
            "totals": report.totals,
        }
    return {"format": "pt", "convsim_init": json.dumps(about, sort_keys=True)}


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None) -> None:
    """Write the file with the library of its format; whatever that raises when the disk fails is an OSError here."""
    try:
        if metadata is None:
            with path.open("wb") as file:  # by file: a name would stand in the archive
                torch.save(tensors, file)
        else:
            safetensors.torch.save_file(tensors, path, metadata=metadata)
            _sort_metadata(path)
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise OSError(str(error).splitlines()[0]) from error


def _sort_metadata(path: Path) -> None:
    """Rewrite a safetensors header in place with its metadata in a fixed order, which the library leaves to chance."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > length:
            raise RuntimeError("the header cannot be rewritten with sorted metadata: it would be longer")
        file.seek(8)
        file.write(text.ljust(length))
