"""Writing whole files or none. Imports no torch: a bad path is refused before torch is loaded.

A file is written in a scratch folder beside it, synced, and only then given its name. A killed run cannot remove that
folder, so the next run that writes to the same place does. A lock that ends with its process tells the living from the
dead. Other machines may not see that lock across a network, and some file systems have none: what another machine made,
or what cannot be locked, goes only after a day in which nothing was written there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import secrets
import shutil
import stat
import time
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from convsim_init.errors import InputError, RunError
from convsim_init.files.sources import SUFFIXES, cause, is_address, with_suffix

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

STDOUT = Path("-")  # stands for standard output, by convention
HOST = f"{zlib.crc32(platform.node().encode()):08x}"
SCRATCH_NAME = re.compile(r"\.([0-9a-f]{8})-[0-9a-f]{16}\.convsim-init\.tmp")
NEW = "new"
ABANDONED = 24 * 60 * 60  # seconds
UNSUPPORTED = (errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # errors of FUSE or SMB, for instance
_scratch_folders: set[Path] = set()


class ExistsError(InputError):
    """The file to write is there already and may not be replaced."""


def check_target(path: str | os.PathLike[str], *, overwrite: bool = False, suffixes: Sequence[str] = SUFFIXES) -> Path:
    """The path, if a file with one of these suffixes can be written there.

    Raises:
        InputError: If its suffix is unknown, its folder is missing or read-only, it is no ordinary
            file, or it exists and may not be replaced.
    """
    target = with_suffix(path, suffixes)
    mode = _mode_at(target)
    if mode is None:
        return target
    if stat.S_ISDIR(mode):
        raise InputError(f"expected a file to write, got the folder {str(target)!r}: name a file in it")
    if not stat.S_ISREG(mode):
        raise InputError(f"expected an ordinary file to write, got {str(target)!r}, which is none: choose another name")
    if not overwrite:
        raise _exists(target)
    return target


@contextlib.contextmanager
def replacing(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary file beside the target that takes its place, synced, when the block ends well.

    The old file, or none, is there until the new one is complete; the mode follows the umask. If the target is a
    symbolic link, what it points to is replaced. What a file system cannot do, such as syncing, is a warning. The
    target must have passed `check_target`. With ``overwrite`` a file that appeared within the block is replaced, too.

    Raises:
        ExistsError: If another file appeared there within the block and may not be replaced.
        RunError: If the block or the replacement fails with an operating system's error.
    """
    with _placing(target, _exists(target)) as (temporary, real):
        # The kernel applies the umask to this mode. A library that replaces the file picks a mode of its own.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        with _optional(target, "its mode could not be set"):
            temporary.chmod(mode)
        with _optional(target, "it could not be synced"):
            _sync(temporary)
        if overwrite:
            temporary.replace(real)
        else:
            _rename_to_free_name(temporary, real)


def check_new_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """The path, if a new folder can be written there; an old one is not replaced, even with ``overwrite``.

    Raises:
        InputError: If the folder around it is missing or read-only, or something is there already.
    """
    target = Path(path)
    if _mode_at(target) is not None or target.is_symlink():
        advice = "remove it first: a whole folder is not replaced" if overwrite else "choose another name"
        raise ExistsError(f"{str(target)!r} exists already: {advice}")
    return target


def write_text(path: str | os.PathLike[str], text: str, *, suffixes: Sequence[str], overwrite: bool = False) -> Path:
    """Write a text in UTF-8 as a whole file, or not at all.

    Raises:
        InputError: If the path cannot be written, as `check_target` says.
        RunError: If writing fails; a file that was there is still there.
    """
    target = check_target(path, overwrite=overwrite, suffixes=suffixes)
    with replacing(target, overwrite=overwrite) as temporary:
        temporary.write_bytes(text.encode())
    return target


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes the target, synced, when the block ends well; see `check_new_folder`.

    Raises:
        ExistsError: If something appeared there within the block.
        RunError: If the block or the renaming fails with an operating system's error.
    """
    with _placing(target, ExistsError(f"{str(target)!r} exists already: choose another name")) as (temporary, real):
        temporary.mkdir()
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            with _optional(target, "it could not be synced"):
                _sync(path)
        # Renaming a folder would replace an empty one in silence.
        if os.path.lexists(real):
            raise FileExistsError
        temporary.rename(real)


def remove_scratch_folders() -> None:
    """Remove the scratch folders of this process, for an end that leaves no contexts."""
    # A copy, because the thread that waits for signals calls this while others write files.
    for folder in list(_scratch_folders):
        _remove(folder)


@contextlib.contextmanager
def _placing(target: Path, exists: ExistsError) -> Iterator[tuple[Path, Path]]:
    """A path in a scratch folder and the real path of the target, where the block then moves it."""
    real = Path(os.path.realpath(target))
    try:
        with _scratch_file(real.parent) as temporary:
            yield temporary, real
    except OSError as error:
        # ENOTEMPTY comes from renaming a folder to another one.
        if isinstance(error, FileExistsError) or error.errno == errno.ENOTEMPTY:
            raise exists from error
        raise RunError(f"could not write {str(target)!r}: {cause(error)}; nothing changed there") from error
    # The target has changed: no error from here on may deny it.
    try:
        _sync(real.parent)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            _warn(target, "its folder could not be synced", error)


def _rename_to_free_name(path: Path, new: Path) -> None:
    try:
        os.link(path, new)  # unlike a rename it never replaces a file
    except OSError as error:
        if isinstance(error, FileExistsError) or os.path.lexists(new):
            raise FileExistsError from error
        # A file system without hard links. A file made since the line above is replaced.
        path.rename(new)


def _mode_at(target: Path) -> int | None:
    """The mode of what is at a path to be written; None if nothing is there and something can be."""
    if is_address(target):
        raise InputError(f"expected a path on this machine, got the address {str(target)!r}: write a file and copy it")
    try:
        real = Path(os.path.realpath(target))
        # The folder of the path itself, too: what is in `gone/..` has a real path, and cannot be opened.
        missing = next((folder for folder in (real.parent, target.parent) if not folder.is_dir()), None)
        if missing is not None:
            advice = "only shells read ~ as the home folder" if target.parts[0].startswith("~") else "create it first"
            raise InputError(f"expected an existing folder to write to, got {str(missing)!r}: {advice}")
        if not os.access(real.parent, os.W_OK | os.X_OK):
            raise InputError(f"expected a folder that can be written to, got {str(real.parent)!r}: choose another")
        return real.lstat().st_mode
    except FileNotFoundError:
        return None
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {str(target)!r}: {cause(error)}; choose another name") from error


def _exists(target: Path) -> ExistsError:
    return ExistsError(
        f"{str(target)!r} exists already: choose another name or pass overwrite=True (--force in the shell)"
    )


def _sync(path: Path) -> None:
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)  # Windows syncs no file that is only read
    except OSError as error:
        if is_folder and error.errno == errno.EACCES:  # not every system opens folders
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _optional(target: Path, problem: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _warn(target, problem, error)


def _warn(target: Path, problem: str, error: OSError) -> None:
    warnings.warn(f"{str(target)!r} is written, but {problem}: {cause(error)}", RuntimeWarning, stacklevel=1)


@contextlib.contextmanager
def _scratch_file(place: Path) -> Iterator[Path]:
    """A path in a new folder in ``place``, which is removed at the end; folders of dead runs are removed first."""
    with contextlib.suppress(OSError):  # some folders can be written to but not listed
        for name in os.listdir(place):
            if match := SCRATCH_NAME.fullmatch(name):
                _remove_if_abandoned(place / name, here=match[1] == HOST)
    folder = lock = None
    while folder is None or not folder.exists():  # another run may remove it before it is locked
        _unlock(lock)
        folder = place / f".{HOST}-{secrets.token_hex(8)}.convsim-init.tmp"
        # For this user alone: nobody else may exchange the file that gets the target's name. On Windows a file would
        # keep these rights there.
        folder.mkdir(0o700 if fcntl else 0o777)
        lock = _lock(folder, wait=True)
    _scratch_folders.add(folder)
    try:
        yield folder / NEW
    finally:
        _remove(folder)
        _scratch_folders.discard(folder)
        _unlock(lock)


def _remove_if_abandoned(folder: Path, *, here: bool) -> None:
    with contextlib.suppress(OSError):
        age = time.time() - max(path.lstat().st_mtime for path in (folder, *folder.iterdir()))
        # Raises an error if another process holds it, and the folder stays.
        lock = _lock(folder, wait=False)
        if age > ABANDONED or (here and lock is not None):
            shutil.rmtree(folder, ignore_errors=True)
        _unlock(lock)


def _lock(folder: Path, *, wait: bool) -> int | None:
    """A descriptor that holds the folder's lock; None where there are no locks.

    Raises:
        BlockingIOError: If another process holds it, without ``wait``.
    """
    descriptor = None
    try:
        if fcntl is not None:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return descriptor
    except OSError as error:
        _unlock(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None


def _unlock(lock: int | None) -> None:
    if lock is not None:
        with contextlib.suppress(OSError):  # the file may have its name already: nothing may fail now
            os.close(lock)


def _remove(folder: Path) -> None:
    try:
        (folder / NEW).unlink(missing_ok=True)
        folder.rmdir()  # unlike rmtree these need no descriptor, of which there may be none left
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
