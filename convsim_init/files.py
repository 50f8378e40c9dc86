"""Writing whole files or none. Imports no torch: a path that cannot be written is refused before torch is loaded."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from convsim_init.errors import InputError, RunError
from convsim_init.scratch import scratch_folder

TORCH_SUFFIXES = (".pt", ".pth")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)


def check_source(path: str | os.PathLike[str]) -> Path:
    """The path, if there is a file with a checkpoint's suffix that can be read.

    Raises:
        InputError: If its suffix is unknown, it is missing, no ordinary file, or may not be read.
    """
    source = Path(path)
    _check_suffix(source, SUFFIXES)
    try:
        mode = source.stat().st_mode
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {str(source)!r}: {_cause(error)}; check the path") from error
    if not stat.S_ISREG(mode):
        raise InputError(f"expected an ordinary file to read, got {str(source)!r}, which is none: name a file")
    if not os.access(source, os.R_OK):
        raise InputError(f"expected a file that may be read, got {str(source)!r}: change its permissions")
    return source


def check_target(path: str | os.PathLike[str], *, overwrite: bool = False, suffixes: Sequence[str] = SUFFIXES) -> Path:
    """The path, if a file with one of these suffixes, by default a checkpoint's, can be written there.

    Raises:
        InputError: If its suffix is unknown, its folder is missing or read-only, it is no ordinary file, or it exists
            and may not be replaced.
    """
    target = Path(path)
    _check_suffix(target, suffixes)
    try:
        _check_place(target, _real(target), overwrite=overwrite)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {str(target)!r}: {_cause(error)}; choose another name") from error
    return target


def _check_suffix(path: Path, suffixes: Sequence[str]) -> None:
    if path.suffix not in suffixes:  # in lower case only: loaders look for just these
        raise InputError(f"expected a file name ending in {', '.join(suffixes)}, got {str(path)!r}: rename it")


def _check_place(target: Path, real: Path, *, overwrite: bool) -> None:
    folder = str(real.parent)
    if not real.parent.is_dir():
        raise InputError(f"expected an existing folder to write to, got {folder!r}: create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"expected a folder that can be written to, got {folder!r}: choose another")
    try:
        mode = real.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise InputError(f"expected a file to write, got the folder {str(target)!r}: name a file in it")
    if not stat.S_ISREG(mode):
        raise InputError(f"expected an ordinary file to write, got {str(target)!r}, which is none: choose another name")
    if not overwrite:
        raise InputError(f"{str(target)!r} exists already: choose another name or overwrite it (--force in the shell)")


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary file beside the target that takes its place, synced, when the block ends well.

    The old file, or none, is there until the new one is complete; the mode follows the umask. If the target is a
    symbolic link, what it points to is replaced.

    Raises:
        RunError: If the block or the replacement fails with an operating system's error.
    """
    try:
        real = _real(target)
        with scratch_folder(real.parent) as folder:
            temporary = folder / "new"
            try:
                # The kernel applies the umask to this mode. A library that replaces the file picks a mode of its own.
                descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
                mode = os.fstat(descriptor).st_mode & 0o777
                os.close(descriptor)
                yield temporary
                temporary.chmod(mode)
                _sync(temporary, os.O_RDWR)
                temporary.replace(real)
            finally:
                temporary.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not every system lets a folder be opened
                _sync(real.parent, os.O_RDONLY)
    except OSError as error:
        raise RunError(f"could not write {str(target)!r}: {_cause(error)}; nothing changed there") from error


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _cause(error: OSError | ValueError) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error)).split())


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
