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
CHUNK = 32  # filters side by side, as in step.c


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
            library.arrive.argtypes, library.arrive.restype = [POINTER(_Layout), *[c_void_p] * 9], None
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

    MOST = 2**20  # weights: within a block only a channel at a time is in the cache, so that blocks only share out work

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
        taps, group_count, channel_count, filters = self._shape = weights.shape
        self._weights = _chunked(weights)
        self._ascent, self._gradient = (torch.zeros_like(self._weights) for _ in range(2))
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
        self._sums = torch.empty(4, group_count, filters, dtype=torch.float64)
        self._overlap, self._couplings = (torch.empty(shape, dtype=torch.float64) for shape in ((), (3, 3)))

    @staticmethod
    def fits(bank: Tensor, settings: Settings) -> bool:
        """Whether blocks of this bank can be compiled ones."""
        usual = settings.pairs == "all" and settings.channels == "matched"
        return usual and bank.dtype == torch.float32 and bank.device.type == "cpu" and library() is not None

    @property
    def weights(self) -> Tensor:
        """As `Block.weights`."""
        return _unchunked(self._weights, self._shape)

    def arrive(self, keep: Tensor, add: Tensor, taken: Tensor) -> tuple[Tensor, float]:
        """As `Block.arrive`."""
        arrays = (
            keep,
            add,
            taken,
            self._weights,
            self._ascent,
            self._gradient,
            self._scratch(),
            self._sums,
            self._overlap,
        )
        self._library.arrive(byref(self._layout), *map(Tensor.data_ptr, arrays))
        return self._sums, float(self._overlap)

    def aim(self, beta: float, lean: Tensor, slow: Tensor) -> Tensor:
        """As `Block.aim`."""
        arrays = (lean, slow, self._weights, self._gradient, self._ascent, self._scratch(), self._couplings)
        self._library.aim(byref(self._layout), beta, *map(Tensor.data_ptr, arrays))
        return self._couplings

    def _scratch(self) -> Tensor:
        """Memory of the thread's own."""
        scratch: Tensor | None = getattr(self._memory, "scratch", None)
        if scratch is None or len(scratch) < self._scratch_size:
            scratch = self._memory.scratch = torch.empty(self._scratch_size)
        return scratch


def _chunked(weights: Tensor) -> Tensor:
    """``[T, g, c, M]`` in the order of ``step.c``: ``[g, c, M T]``, the taps of CHUNK filters at a time."""
    chunks = torch.split(weights.permute(1, 2, 0, 3), CHUNK, -1)
    return torch.cat([chunk.flatten(2) for chunk in chunks], -1)


def _unchunked(chunked: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_chunked`."""
    taps, groups, channels = shape[:3]
    chunks = [chunk.view(groups, channels, taps, -1) for chunk in torch.split(chunked, CHUNK * taps, -1)]
    return torch.cat(chunks, -1).permute(2, 0, 1, 3)
