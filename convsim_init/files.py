"""Writing whole files or none. Imports no torch: a path that cannot be written is refused before torch is loaded."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from convsim_init.errors import InputError, RunError

TORCH_SUFFIXES = (".pt", ".pth")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)


def check_target(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """The path, if a checkpoint can be written there.

    Raises:
        InputError: If its suffix is unknown, its folder is missing or read-only, or it exists and may not be replaced.
    """
    target = Path(path)
    if target.suffix not in SUFFIXES:
        raise InputError(f"expected a file name ending in {', '.join(SUFFIXES)}, got {str(target)!r}: rename it")
    folder = target.parent
    if not folder.is_dir():
        raise InputError(f"expected an existing folder to write to, got {str(folder)!r}: create it first")
    if target.is_dir():
        raise InputError(f"expected a file to write, got the folder {str(target)!r}: name a file in it")
    if target.exists() and not overwrite:
        raise InputError(f"{str(target)!r} exists already: choose another name or overwrite it (--force in the shell)")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"expected a folder that can be written to, got {str(folder)!r}: choose another")
    return target


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary file beside the target that takes its place, synced, when the block ends well.

    The old file, or none, is there until the new one is complete; the mode follows the umask.

    Raises:
        RunError: If the block or the replacement fails with an operating system's error.
    """
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.tmp")
    try:
        # The kernel applies the umask to this mode. A library that replaces the file picks a mode of its own.
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        mode = os.fstat(descriptor).st_mode & 0o777
        os.close(descriptor)
        yield temporary
        temporary.chmod(mode)
        _sync(temporary, os.O_RDWR)
        temporary.replace(target)
        with contextlib.suppress(OSError):  # not every system lets a folder be opened
            _sync(target.parent, os.O_RDONLY)
    except OSError as error:
        raise RunError(f"could not write {str(target)!r}: {error.strerror or error}; nothing changed there") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
