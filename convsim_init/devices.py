"""Devices and packages that are here. torch is imported when it is asked about, not before."""

from __future__ import annotations

import os
import platform

from convsim_init.version import __version__, installed_version

PACKAGES = ("torch", "numpy", "safetensors", "click", "tqdm", "torchvision", "timm")


def available_devices() -> list[str]:
    """Names of the devices that torch can use here."""
    import torch

    cards = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return ["cpu", *(["cuda"] if cards else []), *cards, *(["mps"] if torch.backends.mps.is_available() else [])]


def describe_environment() -> dict[str, str]:
    """Versions, devices, threads, and how a step is computed on the CPU: for a bug report."""
    import torch

    from convsim_init.backends.compiled import describe

    devices = available_devices()
    cards = {name: f"{name} ({torch.cuda.get_device_name(name)})" for name in devices if name.startswith("cuda:")}
    return {
        "convsim-init": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{package: installed_version(package) or "not installed" for package in PACKAGES},
        "step": describe(),
        "cuda": torch.version.cuda or "none",
        "devices": ", ".join(cards.get(name, name) for name in devices),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count() or 'unknown'} cores",
    }
