"""Folders for unfinished files, beside what these are to become, and the removal of those that killed runs left.

A killed run cannot clean up, so the next one that writes to the same place does. A lock that ends with its process
tells the living from the dead. Other machines may not see that lock across a network, and some file systems have none:
what another machine made, or what cannot be locked, goes only after a day in which nothing was written there.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import secrets
import shutil
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

HOST = f"{zlib.crc32(platform.node().encode()):08x}"
NAME = re.compile(r"\.([0-9a-f]{8})-[0-9a-f]{16}\.convsim-init\.tmp")
ABANDONED = 24 * 60 * 60  # seconds
_in_use: set[Path] = set()


@contextlib.contextmanager
def scratch_folder(place: Path) -> Iterator[Path]:
    """A new empty folder in ``place``, gone with all that is in it at the end; what dead runs left goes first.

    Raises:
        OSError: If it cannot be made.
    """
    _remove_abandoned(place)
    folder, lock = _make(place)
    _in_use.add(folder)
    try:
        yield folder
    finally:
        _remove(folder)
        _in_use.discard(folder)
        if lock is not None:
            os.close(lock)


def remove_scratch_folders() -> None:
    """Remove those of this process, because it ends without leaving their contexts."""
    for folder in list(_in_use):
        _remove(folder)


def _make(place: Path) -> tuple[Path, int | None]:
    while True:
        folder = place / f".{HOST}-{secrets.token_hex(8)}.convsim-init.tmp"
        folder.mkdir(0o700)
        try:
            lock = _lock(folder)
            if os.path.samestat(folder.stat(), os.fstat(lock)):
                return folder, lock
            os.close(lock)
        except (BlockingIOError, FileNotFoundError):
            continue  # another run took it for abandoned before it was locked
        except OSError:
            return folder, None


def _lock(folder: Path) -> int:
    """A descriptor that holds the folder's lock; OSError where another has it or there are no locks."""
    if fcntl is None:
        raise OSError("no locks on this system")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_abandoned(place: Path) -> None:
    with contextlib.suppress(OSError):  # a folder may be written to and not listed
        for name in os.listdir(place):
            match = NAME.fullmatch(name)
            if match:
                _remove_if_abandoned(place / name, match[1] == HOST)


def _remove_if_abandoned(folder: Path, ours: bool) -> None:
    with contextlib.suppress(OSError):
        old = time.time() - max(path.lstat().st_mtime for path in (folder, *folder.iterdir())) > ABANDONED
        try:
            lock = _lock(folder)
        except BlockingIOError:
            return
        except OSError:
            lock = None
        if old or (ours and lock is not None):
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _remove(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
