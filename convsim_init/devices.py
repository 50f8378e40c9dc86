"""Which devices and packages are here."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from convsim_init.errors import InputError
from convsim_init.version import __version__

PACKAGES = ("torch", "numpy", "safetensors", "click", "tqdm", "torchvision", "timm")


def find_device(name: str) -> torch.device:
    """The device called ``auto`` (CUDA where there is one, else the CPU), ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Raises:
        InputError: If there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    present = available_devices()
    if name in present:
        return torch.device(name)
    raise InputError(f"device: expected auto or one of those here ({', '.join(present)}), got {name!r}")


def available_devices() -> list[str]:
    """Names of the devices that torch can use here."""
    cards = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return ["cpu", *(["cuda"] if cards else []), *cards, *(["mps"] if torch.backends.mps.is_available() else [])]


def describe_environment() -> dict[str, str]:
    """Versions, devices and threads, for a bug report."""
    names = {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return {
        "convsim-init": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{package: _version(package) for package in PACKAGES},
        "cuda": torch.version.cuda or "none",
        "devices": ", ".join(f"{d} ({names[d]})" if d in names else d for d in available_devices()),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
