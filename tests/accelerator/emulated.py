"""The emulated accelerator of `emulated.cpp`, compiled and made a device of torch for the whole process."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import torch

NAME = "emulated"
SOURCE = Path(__file__).with_name("emulated.cpp")
BUILD = Path(__file__).parents[2] / "build" / "accelerator"
COMPILER = shutil.which("g++")
# Without debug information, inlining or warnings about torch's headers: it is compiled fast, and may be slow.
FLAGS = ["-std=c++20", "-O0", "-fPIC", "-shared", "-w"]


def build() -> Path:
    """The compiled library for this version of torch; compiled at the first call."""
    folder = Path(torch.__file__).parent
    includes = [f"-I{folder / 'include'}", f"-I{folder / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    command = [COMPILER, *FLAGS, *includes, str(SOURCE), f"-L{folder / 'lib'}", "-lc10", "-ltorch_cpu", "-o"]
    version = hashlib.sha256(f"{torch.__version__}{command}".encode() + SOURCE.read_bytes()).hexdigest()[:16]
    library = BUILD / f"{version}.so"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        made = BUILD / f"{version}-{os.getpid()}"  # renamed when it is whole: another process may do the same
        subprocess.run([*command, str(made)], check=True)
        made.replace(library)
    return library


def register() -> None:
    """Make it a device of this process, called `NAME`; there is no way back."""
    torch.ops.load_library(build())
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(
        NAME,
        SimpleNamespace(
            is_available=lambda: True,
            device_count=lambda: 1,
            current_device=lambda: 0,
            manual_seed_all=lambda seed: None,
            get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
            _is_in_bad_fork=lambda: False,
        ),
    )
