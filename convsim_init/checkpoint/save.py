"""Writing checkpoints that any training codebase loads: full state dicts, whole files or none, the same bytes each run.

Tensors are written by `safetensors` or `torch.save`; what is added here is the care around them.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import BinaryIO
from zipfile import ZipFile, ZipInfo

import safetensors.torch
import torch
from torch import Tensor, nn

from convsim_init.checkpoint.state_dict import (
    changed_entries,
    faded_remarks,
    module_versions,
    plain_tensors,
    state_entries,
    with_versions,
    without_keys,
)
from convsim_init.errors import InputError, RunError
from convsim_init.files.sources import METADATA_KEY, TORCH_SUFFIXES
from convsim_init.files.writing import check_target, replacing
from convsim_init.report.record import TORCH_RECORD, json_text
from convsim_init.report.report import Report
from convsim_init.settings import check_prefix, check_type
from convsim_init.version import __version__


def save_checkpoint(
    model: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    report: Report | None = None,
    prefix: str = "",
    convs_only: bool = False,
    exclude: Sequence[str] = (),
    dtype: torch.dtype | None = torch.float32,
    overwrite: bool = False,
) -> Path:
    """Write a model's weights as a file that any training codebase loads.

    The file holds every entry of the state dict under its bare key (without what DistributedDataParallel and
    torch.compile add to it), contiguous; tied weights under each of their names. It appears whole or not at all, and
    the same arguments give the same bytes. If the path is a symbolic link, the file it points to is written.

    Args:
        model: Model, or its state dict, to write.
        path: Ends in ``.safetensors``, or in ``.pt`` or ``.pth`` for a file of `torch.save`.
        report: Report of the run that made the weights; its model, seed, settings and totals go into the metadata.
        prefix: Text that ends in a dot, to put before every key, for instance ``"model."``.
        convs_only: Write only the convolutions that the report says were changed; needs ``report``.
        exclude: Shell patterns of keys to leave out, such as ``"fc.*"`` for another number of classes.
        dtype: Dtype of the floating tensors, except for packed ones such as those of float4; None keeps each one's
            own. A warning says if it rounds filters away.
        overwrite: Replace an existing file.

    Returns:
        The path given.

    Raises:
        InputError: If the path cannot be written, the weights hold other than finite tensors, a pattern matches no
            key, or none is left; or the prefix ends in no dot.
        RunError: If writing fails, for instance on a full disk; the file that was there is still there.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3))
        >>> report = ci.initialize_(model)
        >>> ci.save_checkpoint(model, "init.safetensors", report=report, overwrite=True).name
        'init.safetensors'
    """
    check_target(path, overwrite=overwrite)
    contents = checkpoint_contents(
        model, report=report, prefix=prefix, convs_only=convs_only, exclude=exclude, dtype=dtype
    )
    for remark in contents.remarks:
        warnings.warn(remark, stacklevel=2)
    return write_checkpoint(contents, path, overwrite=overwrite)


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds, whatever its name; it can be sent from one process to another."""

    tensors: dict[str, Tensor] = field(repr=False)  # plain, each with memory of its own, under the keys of the file
    versions: Mapping[str, object] | None  # notes of the modules beside them, for a file of `torch.save`
    metadata: dict[str, str]  # of a safetensors file; what it says of the run is an entry of other files
    remarks: list[str] = field(default_factory=list)  # sentences about weights that the dtype rounds away


def checkpoint_contents(
    model: nn.Module | Mapping[str, Tensor],
    *,
    report: Report | None = None,
    prefix: str = "",
    convs_only: bool = False,
    exclude: Sequence[str] = (),
    dtype: torch.dtype | None = torch.float32,
) -> Contents:
    """What `save_checkpoint` would write with the same arguments; weights and patterns are refused as there."""
    check_prefix(prefix)
    if report is not None:
        check_type("report", report, Report, "pass what initialize_ returned, or leave it out")
    entries = state_entries(model)
    kept = without_keys(entries, exclude)
    if convs_only:
        changed = changed_entries(entries, report)
        kept = {key: value for key, value in kept.items() if key in changed}
        if not kept:
            raise InputError("convs_only: expected a changed convolution to write, got all of them excluded")
    plain = plain_tensors(kept, dtype)
    tensors = {prefix + key: tensor for key, tensor in plain.items()}
    versions = module_versions(model, prefix)
    return Contents(tensors, versions, _metadata(report), faded_remarks(kept, plain))


def write_checkpoint(contents: Contents, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write a checkpoint; it fails as `save_checkpoint` does, and if the file cannot hold such keys or dtypes."""
    target = check_target(path, overwrite=overwrite)
    with replacing(target, overwrite=overwrite) as temporary:
        if target.suffix in TORCH_SUFFIXES:
            _write_torch(with_versions(contents.tensors, contents.versions), temporary, contents.metadata)
        else:
            with _fitting(contents.tensors):
                safetensors.torch.save_file(contents.tensors, temporary, metadata=contents.metadata)
            with temporary.open("r+b") as file:
                _sort_metadata(file)
    return target


def checkpoint_bytes(contents: Contents) -> bytes:
    """What `write_checkpoint` writes into a ``.safetensors`` file."""
    with _fitting(contents.tensors):
        file = io.BytesIO(safetensors.torch.save(contents.tensors, contents.metadata))
    _sort_metadata(file)
    return file.getvalue()


def _metadata(report: Report | None) -> dict[str, str]:
    about: dict[str, object] = {"format_version": 1, "version": __version__}
    if report is not None:
        about |= {
            "model": report.model,
            "seed": report.seed,
            "base": report.base,
            "settings": asdict(replace(report.settings, channels=report.channels)),
            "totals": report.totals,
        }
        about |= {"calibrated": report.calibrated} if report.calibrated is not None else {}
        about |= {"options": report.options} if report.options else {}
        if report.channels == "auto":  # not the same in all layers
            about["all_channels"] = [layer.name for layer in report.layers if layer.channels == "all"]
    # Loaders, such as those of transformers, refuse or have refused a file that names no format.
    return {"format": "pt", "convsim_init": json_text(about, sort_keys=True)}


def _write_torch(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    # Written to memory first: torch would hide a full disk behind an error of its own.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with ZipFile(buffer, "a") as archive:  # torch ignores entries that it does not know
        archive.writestr(ZipInfo(TORCH_RECORD), metadata["convsim_init"])  # without the date, which would differ
    path.write_bytes(buffer.getbuffer())


@contextmanager
def _fitting(tensors: dict[str, Tensor]) -> Iterator[None]:
    """Context that refuses what safetensors cannot hold, and turns its other errors into those of the system."""
    if METADATA_KEY in tensors:
        raise InputError(
            f"expected keys that safetensors can hold, got {METADATA_KEY!r}: rename it or write a .pt file"
        )
    try:
        yield
    except KeyError as error:
        raise InputError(f"expected dtypes that safetensors can hold, got {error}: write a .pt file") from error
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error


def _sort_metadata(file: BinaryIO) -> None:
    """Rewrite a safetensors header in place, with its metadata in a fixed order: the library's is random."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    header[METADATA_KEY] = dict(sorted(header[METADATA_KEY].items()))
    # Letters as the library writes them: escaped they would be longer than what is there.
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    if len(text) > length:
        raise RunError("the header of the file cannot be rewritten in a fixed order: it would be longer")
    # Spaces fill the header up, as the format allows: the tensors behind it do not move.
    file.seek(8)
    file.write(text.ljust(length))
