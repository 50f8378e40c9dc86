"""The device that ``--device`` names, and errors of CUDA. torch is imported when it is needed, not before."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from convsim_init.devices import available_devices
from convsim_init.errors import InputError, RunError
from convsim_init.parallel.launch import launched
from convsim_init.settings import DEFAULT_DEVICE

if TYPE_CHECKING:
    import torch

MPS_REMARK = "--device mps: computed on the CPU, because MPS has no float64; the weights are the same"


def check_device_name(name: str) -> None:
    """Refuse, by an `InputError`, all but ``auto``, ``cpu``, ``cuda``, ``cuda:N`` and ``mps``, be they here or not."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?|mps", name):
        raise InputError(f"expected the device to be auto, cpu, cuda, cuda:N or mps, got {name!r}")


def find_device(name: str) -> torch.device:
    """The device to compute on; ``auto`` is the CPU: no GPU has been measured to be faster.

    For ``cuda``, each of several processes that torchrun started on this machine gets a CUDA device of its own, or the
    only one that it sees. For ``mps`` it is the CPU, as `MPS_REMARK` says.

    Raises:
        InputError: If there is no such device here, or not one for each process.
    """
    import torch

    launch = launched()
    present = available_devices()
    if name == "auto":
        name = DEFAULT_DEVICE
    if name == "cuda" and name in present and launch.size > 1:
        cards = torch.cuda.device_count()
        if cards == 1:  # CUDA_VISIBLE_DEVICES shows each process another one, or all share it
            return torch.device("cuda", 0)
        if launch.local_size > cards:
            raise InputError(
                f"expected no more processes on this machine than its {cards} CUDA devices, got {launch.local_size}: "
                f"torchrun --nproc-per-node {cards}, or --device cpu"
            )
        return torch.device("cuda", launch.local_rank)
    if name in present:
        return torch.device("cpu" if name == "mps" else name)
    raise InputError(f"expected a device that is here ({', '.join(present)}) or auto, got {name!r}: choose another")


@contextmanager
def cuda_errors() -> Iterator[None]:
    """Context that turns an error of CUDA into a `RunError` of one line, which says what to do."""
    try:
        yield
    except RuntimeError as error:
        cause = re.search(r".*(CUDA|cusolver).*", str(error))  # one line; the others are for developers
        if cause is None or isinstance(error, RunError):  # a RunError is a RuntimeError of one line already
            raise
        sentence = cause[0].split(". ")[0]
        raise RunError(f"the GPU cannot compute this: {sentence}; --device cpu computes it without one") from error
