"""The arithmetic of a conjugate-gradient step on a block, compiled from ``step.c`` when the package was built.

It is there where a C compiler was, takes about a fifth of the time of torch's operations, and needs nothing else.
"""

from __future__ import annotations

import ctypes
import os
import threading
from ctypes import POINTER, byref, c_float, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from convsim_init.fourier import Fourier
from convsim_init.settings import Settings

SWITCH = "CONVSIM_INIT_COMPILED"


class _Layout(ctypes.Structure):
    """As in ``step.c``."""

    _fields_ = (
        *((name, c_int64) for name in ("taps", "even", "points", "cosines", "groups", "channels", "filters")),
        *((name, c_int64) for name in ("coarse_points", "coarse_cosines")),
        *((name, c_void_p) for name in ("first", "second", "identity", "coarse_first", "coarse_second")),
        ("coarse_constant", c_float),
    )


@lru_cache(maxsize=1)
def _built() -> ctypes.CDLL | None:
    for path in Path(__file__).parent.glob("_step*.so"):
        try:
            library = ctypes.CDLL(str(path))
            library.scratch_size.argtypes, library.scratch_size.restype = [POINTER(_Layout)], c_int64
            library.arrive.argtypes, library.arrive.restype = [POINTER(_Layout), *[c_void_p] * 10], None
            library.aim.argtypes = [POINTER(_Layout), c_float, *[c_void_p] * 7]
            library.aim.restype = None
            return library
        except (OSError, AttributeError):  # of another system, for instance on a shared disk, or another version
            continue
    return None


def library() -> ctypes.CDLL | None:
    """What was compiled; None if nothing was, or ``CONVSIM_INIT_COMPILED=0`` in the environment forbids it."""
    return None if os.environ.get(SWITCH) == "0" else _built()


class CompiledBlock:
    """A `blocks.Block` for what the defaults need: float32 on the CPU, all pairs, matched channels."""

    def __init__(
        self,
        groups: slice,
        channels: slice,
        weights: Tensor,
        fourier: Fourier,
        settings: Settings,
        memory: threading.local,
    ) -> None:
        library_ = library()
        assert library_ is not None
        self.groups, self.channels = groups, channels
        self._library, self._memory = library_, memory
        self._weights = weights.permute(1, 2, 0, 3).contiguous()  # [g, c, T, M]
        self._ascent, self._gradient, self._previous = (torch.zeros_like(self._weights) for _ in range(3))
        group_count, channel_count, taps, filters = self._weights.shape
        full, coarse, free = fourier.full, fourier.coarse, fourier.coarse_is_free
        matrices = (full.first, full.second, fourier.identity, coarse.first, coarse.second)
        self._kept = [matrix.contiguous() for matrix in matrices]  # as long as the layout points to them
        first, second, identity, coarse_first, coarse_second = (tensor.data_ptr() for tensor in self._kept)
        self._layout = _Layout(
            taps=taps,
            even=(taps + 1) // 2,
            points=fourier.points,
            cosines=fourier.points // 2 + 1,
            groups=group_count,
            channels=channel_count,
            filters=filters,
            coarse_points=fourier.coarse_points,
            coarse_cosines=fourier.coarse_points // 2 + 1,
            first=first,
            second=second,
            identity=identity,
            coarse_first=None if free else coarse_first,
            coarse_second=None if free else coarse_second,
            coarse_constant=fourier.coarse_constant,
        )
        self._scratch_size = library_.scratch_size(byref(self._layout))

    @staticmethod
    def fits(bank: Tensor, settings: Settings) -> bool:
        """Whether blocks of this bank can be compiled ones."""
        usual = settings.pairs == "all" and settings.channels == "matched"
        return usual and bank.dtype == torch.float32 and bank.device.type == "cpu" and library() is not None

    @property
    def weights(self) -> Tensor:
        """As `Block.weights`."""
        return self._weights.permute(2, 0, 1, 3)

    def arrive(self, keep: Tensor, add: Tensor, taken: Tensor) -> tuple[Tensor, float]:
        """As `Block.arrive`."""
        group_count, _, _, filters = self._weights.shape
        sums = torch.empty(4, group_count, filters, dtype=torch.float64)
        overlap = torch.empty(1, dtype=torch.float64)
        half_taken = taken / 2
        arrays = [keep, add, half_taken, self._weights, self._ascent, self._gradient, self._previous]
        arrays += [self._scratch(), sums, overlap]
        self._library.arrive(byref(self._layout), *(array.data_ptr() for array in arrays))
        return sums, float(overlap)

    def aim(self, beta: float, lean: Tensor, slow: Tensor) -> Tensor:
        """As `Block.aim`."""
        couplings = torch.empty(3, 3, dtype=torch.float64)
        arrays = [lean, slow, self._weights, self._gradient, self._ascent, self._scratch(), couplings]
        self._library.aim(byref(self._layout), beta, *(array.data_ptr() for array in arrays))
        self._previous, self._gradient = self._gradient, self._previous
        return couplings

    def _scratch(self) -> Tensor:
        """Memory of the thread's own."""
        scratch: Tensor | None = getattr(self._memory, "scratch", None)
        if scratch is None or len(scratch) < self._scratch_size:
            scratch = self._memory.scratch = torch.empty(self._scratch_size)
        return scratch
