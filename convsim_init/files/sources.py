"""Which files are checkpoints, and whether one can be read. Imports no torch, as nothing here does."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Sequence
from contextlib import suppress
from os.path import isdir, isfile
from pathlib import Path
from typing import Any

from convsim_init.errors import InputError

TORCH_SUFFIXES = (".pt", ".pth")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
READ_SUFFIXES = (*SUFFIXES, ".ckpt", ".bin", ".th", ".tar")  # others write these; .tar as in .pth.tar
FOLDER_FILES = (  # of Hugging Face, where an index names several files, and of torch.distributed.checkpoint
    "model.safetensors", "model.safetensors.index.json", "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json", ".metadata",
)  # fmt: skip
METADATA_KEY = "__metadata__"  # in the header of safetensors
MAX_HEADER = 10**7  # bytes of a header that are read, at most
MAPPED = os.name != "nt"  # whether tensors may stay in the file: Windows does not replace a mapped file
CHECKPOINT = "if it is a checkpoint, rename it"  # advice on a file of another suffix
SAVE = "save the PyTorch model's state_dict() as .safetensors"
PROGRAM = f"another program's: {SAVE}"
OTHERS = (".onnx", ".gguf", ".h5", ".keras", ".pb", ".tflite", ".engine", ".msgpack", ".npz", ".mlmodel")
NAMED_KINDS = dict.fromkeys(OTHERS, PROGRAM) | {
    ".pt2": f"an exported program: {SAVE}",
    ".distcp": "a part of a checkpoint: name its folder",
}
HEAD = 300  # bytes of a file that tell its kind, of an archive of tar those from 257 on
KINDS = {  # what begins like this is no checkpoint, and what to do
    rb"GGUF|\x89HDF|\x93NUMPY": PROGRAM,
    rb"\x1f\x8b|BZh|\xfd7zXZ|.{257}ustar": "an archive: unpack it first",
    rb"version https://git-lfs": "a pointer of Git LFS: `git lfs pull` gets the file itself",
}


def is_source(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a checkpoint, which is a file of such a name or a folder that holds one."""
    source = Path(path)
    named = source.suffix in READ_SUFFIXES or source.name in FOLDER_FILES
    # The path of an empty text is the working folder, which may hold weights.
    return path != "" and (named or folder_file(source) is not None)


def folder_files(folder: Path) -> list[Path]:
    """The files of weights in a folder, and indices of several; the first is the one to read."""
    # pathlib raises at impossible names, so it is not used for users' paths, here and elsewhere.
    return [folder / name for name in FOLDER_FILES if isfile(folder / name)]


def folder_file(folder: Path) -> Path | None:
    """The first of `folder_files`; None if there is none."""
    return next(iter(folder_files(folder)), None)


def without_weights(folder: str | os.PathLike[str]) -> InputError:
    """The error that says which files a folder should hold one of, and names a checkpoint in it, if one is there."""
    names = f"{', '.join(FOLDER_FILES[:-1])} or {FOLDER_FILES[-1]}"
    inside = next((str(path) for path in sorted(Path(folder).glob("*")) if is_source(path)), None)
    example = f", such as {inside!r}" if inside else ""
    return InputError(
        f"expected a folder with {names}, got {str(folder)!r}, which has none of them: name the file{example}"
    )


def of_another_kind(path: Path) -> InputError | None:
    """The error that says what a file is that is no checkpoint, if its name or its beginning tells."""
    kind = NAMED_KINDS.get(path.suffix)
    if kind is None and isfile(path):
        with suppress(OSError), path.open("rb") as file:
            head = file.read(HEAD)
            kind = next((kind for start, kind in KINDS.items() if re.match(start, head, re.DOTALL)), None)
    return None if kind is None else InputError(f"expected weights of PyTorch, got {str(path)!r}, which is {kind}")


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address such as ``https://host/name``."""
    return re.match(r"\w{2,}:/", str(path)) is not None  # a path has one slash less


def downloaded_first(address: object) -> InputError:
    """The error for an address in place of a file or a model."""
    return InputError(
        f"expected a file, got the address {str(address)!r}: nothing is downloaded here; download it first"
    )


def check_source(path: str | os.PathLike[str]) -> Path:
    """The path of a checkpoint's file that can be read; of a folder the file in it.

    Raises:
        InputError: If its suffix is unknown, it is missing, no ordinary file, or may not be read.
    """
    if is_address(path):
        raise downloaded_first(path)
    if path == "":  # whose path would be the working folder
        raise InputError("expected the path of a checkpoint, got an empty text: name a file")
    source = folder_file(Path(path)) or Path(path)
    if isdir(source):
        raise without_weights(path)
    if source.suffix not in READ_SUFFIXES and (error := of_another_kind(source)):
        raise error
    if source.suffix != ".json" and source.name != ".metadata":
        source = with_suffix(source, READ_SUFFIXES, CHECKPOINT)
    try:
        mode = source.stat().st_mode
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {str(source)!r}: {cause(error)}; check the path") from error
    if not stat.S_ISREG(mode):
        raise InputError(f"expected an ordinary file to read, got {str(source)!r}, which is none: name a file")
    if not os.access(source, os.R_OK):
        raise InputError(f"expected a file that may be read, got {str(source)!r}: change its permissions")
    return source


def safetensors_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: its tensors' dtypes and places by their keys, and its metadata.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no safetensors file, or its header is very long.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length)) if length <= MAX_HEADER else None
    if not isinstance(header, dict):
        raise ValueError("no safetensors file")
    return header


def with_suffix(path: str | os.PathLike[str], suffixes: Sequence[str], advice: str = "choose another name") -> Path:
    """The path, if its name ends in one of the suffixes.

    Raises:
        InputError: If it does not, or if it is no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"expected the path of a file, got {type(path).__name__}: pass a text or a pathlib.Path")
    if Path(path).suffix not in suffixes:  # in lower case only: loaders look for just these
        raise InputError(f"expected a file name ending in {', '.join(suffixes)}, got {str(path)!r}: {advice}")
    return Path(path)


def cause(error: OSError | ValueError) -> str:
    """The system's message of an error, on one line."""
    return " ".join((getattr(error, "strerror", None) or str(error)).split())
