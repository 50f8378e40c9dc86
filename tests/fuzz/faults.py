"""Let calls of the operating system fail while files are written, and signal commands at random moments.

    python tests/fuzz/faults.py [--faults 2000] [--signals 100] [--seed 0]

A fault is one call, of any of those below, that raises an error of the system, or a limit of the file's size. After
each the file is whole, the old one or the new one, what is said about it is true, and the next write leaves no litter.
A signalled command ends with that signal's status, or was done before; it says one line at most. Prints the counts as
JSON; the status is 1 if something was damaged, left or said wrongly.
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
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch

import convsim_init as ci
from convsim_init.cli.main import main as command
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


def send_signals(count: int, folder: Path, chance: random.Random) -> Counter[str]:
    """Signal that many commands, each in a process of its own, at moments of their run."""
    arguments = ["cifar_resnet18", "--out", "init.safetensors", "--steps", "2", "-q"]
    os.chdir(folder)
    begin = time.monotonic()
    assert ended(run_command(arguments)) == 0
    usual, whole = time.monotonic() - begin, Path("init.safetensors").read_bytes()
    Path("init.safetensors").unlink()
    keys = (
        "ended by the signal",
        "done before",
        "wrong status",
        "damaged files",
        "folders with litter",
        "odd messages",
    )
    counts: Counter[str] = Counter(dict.fromkeys(keys, 0))
    for number in range(count):
        which = (signal.SIGTERM, signal.SIGINT)[number % 2]
        child = run_command(arguments)
        time.sleep(chance.uniform(0, usual))
        os.kill(child, which)
        status = ended(child)
        counts["ended by the signal"] += status == 128 + which
        counts["done before"] += status == 0
        counts["wrong status"] += status not in (0, 128 + which)
        lines = Path("../said").read_text().splitlines()
        counts["odd messages"] += len(lines) > 1 or "Traceback" in "".join(lines)
        left = sorted(os.listdir())
        counts["folders with litter"] += left not in ([], ["init.safetensors"])
        if "init.safetensors" in left:
            counts["damaged files"] += Path("init.safetensors").read_bytes() != whole
            Path("init.safetensors").unlink()
    counts["signals"] = count
    return counts


def run_command(arguments: list[str]) -> int:
    """The id of a process that runs the command, as soon as it begins."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        said = os.open("../said", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.write(tell, b"!")
        try:
            command(arguments)
        except SystemExit as end:
            os._exit(end.code if isinstance(end.code, int) else 1)
        except KeyboardInterrupt:  # before its handlers were there
            os._exit(130)
        os._exit(1)
    os.read(ready, 1)
    os.close(ready)
    os.close(tell)
    return child


def ended(child: int) -> int:
    """The exit status of a process, as a shell gives it."""
    status = os.waitpid(child, 0)[1]
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=2000, help="how many (default 2000)")
    parser.add_argument("--signals", type=int, default=100, help="how many (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of what fails, and when (default 0)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(options.seed)
    folders = [Path(tempfile.mkdtemp()) / "files" for _ in range(2)]
    for folder in folders:
        folder.mkdir()
    counts = [inject_faults(options.faults, folders[0], chance), send_signals(options.signals, folders[1], chance)]
    print(json.dumps(counts))
    bad = ("damaged files", "false messages", "folders with litter", "wrong status", "odd messages")
    return int(any(each[key] for each in counts for key in bad))


if __name__ == "__main__":
    sys.exit(main())
