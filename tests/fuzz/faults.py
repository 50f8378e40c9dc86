"""Let calls of the operating system fail while files are written.

    python tests/fuzz/faults.py [--faults 2000] [--seed 0]

A fault is one call, of any of those below, that raises an error of the system, or a limit of the file's size. After
each the file is whole, the old one or the new one, what is said about it is true, and the next write leaves no litter.
Prints the counts as JSON; the status is 1 if something was damaged, left or said wrongly.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import random
import resource
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch

import convsim_init as ci
from convsim_init.errors import InputError, RunError

CALLS = (
    "open",
    "fsync",
    "close",
    "mkdir",
    "rmdir",
    "unlink",
    "rename",
    "replace",
    "link",
    "chmod",
    "stat",
    "lstat",
    "listdir",
)
CODES = (errno.EIO, errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.EMFILE, errno.ESTALE)
NAMES = ("init.safetensors", "init.pt")


@contextlib.contextmanager
def failing(name: str, number: int, code: int) -> Iterator[list[int]]:
    """Let that call of a function of `os`, counted from 0, fail once."""
    real: Callable[..., object] = getattr(os, name)
    counted: list[int] = []

    def call(*arguments: object, **options: object) -> object:
        counted.append(1)
        if len(counted) == number + 1:
            if name == "close":  # a descriptor is gone even where closing it failed
                real(*arguments)
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    with mock.patch.object(os, name, call):
        yield counted


@contextlib.contextmanager
def limited(size: int) -> Iterator[list[int]]:
    """Let files grow to that size in bytes, no larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        yield [1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def inject_faults(count: int, folder: Path, chance: random.Random) -> Counter[str]:
    """Write with faults until that many have happened."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    states = [{"w": torch.full((100, 3, 20, 20), value)} for value in (1.0, 2.0)]
    whole = {name: [written(state, folder / name) for state in states] for name in NAMES}
    counts: Counter[str] = Counter({"damaged files": 0, "false messages": 0, "folders with litter": 0})
    while counts["faults"] < count:
        name, there = chance.choice(NAMES), chance.random() < 0.5
        path, (old, new) = folder / name, whole[name]
        if there:
            path.write_bytes(old)
        code = chance.choice(CODES)
        fault = failing(chance.choice(CALLS), chance.randrange(4), code)
        if chance.random() < 0.2:
            fault = limited(chance.randrange(len(new)))
        said = ""
        with warnings.catch_warnings(record=True) as warned, fault as counted:
            warnings.simplefilter("always")
            try:
                ci.save_checkpoint(states[1], path, overwrite=there)
            except (InputError, RunError) as error:
                said = str(error)
        if not counted:
            path.unlink()
            continue
        counts["faults"] += 1
        content = path.read_bytes() if path.exists() else b""
        untouched = content == (old if there else b"")
        counts["damaged files"] += not untouched and content != new
        told_written = not said
        counts["false messages"] += (
            told_written == untouched or "\n" in said or ("nothing changed" in said and not untouched)
        )
        counts["refused"] += bool(said)
        counts["warned"] += bool(warned)
        ci.save_checkpoint(states[1], path, overwrite=True)
        counts["folders with litter"] += os.listdir(folder) != [name]
        path.unlink()
    return counts


def written(state: dict[str, torch.Tensor], path: Path) -> bytes:
    """The bytes of a file of that state; the file is gone again."""
    ci.save_checkpoint(state, path)
    content = path.read_bytes()
    path.unlink()
    return content


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=2000, help="how many (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of what fails (default 0)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        counts = inject_faults(options.faults, Path(folder), random.Random(options.seed))
    print(json.dumps(counts))
    return int(any(counts[key] for key in ("damaged files", "false messages", "folders with litter")))


if __name__ == "__main__":
    sys.exit(main())
