"""The arithmetic of a conjugate-gradient step and of the regularizer, compiled from ``step.c`` with the package.

It is there where a C compiler was, and needs nothing else; torch's operations take several times as long.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from ctypes import POINTER, byref, c_double, c_float, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from convsim_init.functional.fourier import Fourier, Part
from convsim_init.settings import SWITCH, Channels, Pairs, Settings, may_use_kernels

NAME = "_step.so"  # the name that setup.py gives it, the same for every version of Python
INTERFACE = 4  # what interface_version() in step.c returns; a library built from another version is not used
CHUNK = 32  # filters side by side in memory, as in step.c


class _Sizes(ctypes.Structure):
    """The struct ``Sizes`` of ``step.c``."""

    _fields_ = tuple((name, c_int64) for name in ("taps", "even", "points", "cosines"))


class _Layout(ctypes.Structure):
    """The struct ``Layout`` of ``step.c``."""

    _fields_ = (
        *((name, _Sizes) for name in ("full", "coarse")),
        *((name, c_int64) for name in ("groups", "channels", "filters")),
        *((name, c_void_p) for name in ("first", "second", "identity", "coarse_first", "coarse_second")),
        ("coarse_constant", c_float),
    )

    @classmethod
    def of(cls, fourier: Fourier, groups: int, channels: int, filters: int) -> _Layout:
        """The layout of a bank whose kernels lie in the coordinates of ``fourier``."""
        # In the order of the fields. ctypes leaves null those that get no value, from which step.c
        # knows that the weights are their own coefficients on the coarse lattice.
        coarse = () if fourier.coarse_is_free else (fourier.coarse.first, fourier.coarse.second)
        bases = (fourier.full.first, fourier.full.second, fourier.identity, *coarse)
        kept = [basis.contiguous() for basis in bases]
        taps, lattices = len(fourier.rotation), (fourier.points, fourier.coarse_points)
        layout = cls(
            *(_Sizes(taps, (taps + 1) // 2, points, points // 2 + 1) for points in lattices),
            *(groups, channels, filters),
            *(tensor.data_ptr() for tensor in kept),
            coarse_constant=fourier.coarse_constant,
        )
        layout.kept = kept  # the layout holds their addresses alone, which keep nothing alive
        return layout


def _with_lanes(library: ctypes.CDLL, lanes: int) -> ctypes.CDLL:
    """The library, its functions for vectors of that many floats, such as ``evaluate_8``, by their bare names too."""
    pointers = [c_void_p] * 9
    # Without types ctypes passes an address as a C int, which cuts it to 32 bits.
    library.scratch_size.argtypes, library.scratch_size.restype = [POINTER(_Layout)], c_int64
    for name, arguments, result in (
        ("evaluate", pointers, None),
        ("turn", [c_float, *pointers[:7]], None),
        ("similarity", [c_float, *pointers[:3]], c_double),
    ):
        function = library[f"{name}_{lanes}"]
        function.argtypes, function.restype = [POINTER(_Layout), *arguments], result
        setattr(library, name, function)
    return library


@lru_cache(maxsize=1)
def _built() -> ctypes.CDLL | str:
    """The compiled library, or why it cannot be used."""
    path = Path(__file__).parent / NAME
    try:
        library = ctypes.CDLL(str(path))
        versions = library.interface_version(), library.chunk_size()
        if versions == (INTERFACE, CHUNK):
            return _with_lanes(library, library.lanes())
    # It was built on another system, as on a shared disk, or from a version without these functions.
    except (OSError, AttributeError) as error:
        return f"{path} cannot be loaded: {error}" if path.exists() else f"{path} was not compiled"
    return f"{path} is of another version: install the package again"


def library() -> ctypes.CDLL | None:
    """The compiled library; None if it cannot be used, or ``CONVSIM_INIT_COMPILED=0`` in the environment forbids it."""
    # The library is loaded once, but the environment is read at each call, because it may change.
    found = _built() if may_use_kernels() else None
    return found if isinstance(found, ctypes.CDLL) else None


def describe() -> str:
    """How a step is computed on the CPU, and if not by the compiled library, why."""
    if library():
        return "compiled"
    found = _built()
    return f"in torch's operations: {found if isinstance(found, str) else f'{SWITCH}=0'}"


def fits(dtype: torch.dtype, device: torch.device, pairs: Pairs, channels: Channels) -> bool:
    """Whether the compiled library is there and computes with such weights and settings."""
    usual = pairs == "all" and channels == "matched"
    return usual and dtype == torch.float32 and device.type == "cpu" and library() is not None


class CompiledSimilarity:
    """Convolutional Similarity, with its gradient, of banks ``[G, M, C, *kernel_size]`` of one shape that `fits`."""

    def __init__(self, shape: Sequence[int]) -> None:
        groups, filters, channels, *kernel_size = shape
        self._library = cast(ctypes.CDLL, library())
        self._layout = _Layout.of(_folded(tuple(kernel_size)), groups, channels, filters)
        self._scratch_size = self._library.scratch_size(byref(self._layout))
        # Filters of norm r have r^4 times the CS of unit ones, which with r = pairs^(-1/4) is the mean over
        # the pairs. All filters form pairs, for step.c refuses those that are zero.
        self._radius = max(1, groups * filters * (filters - 1) // 2) ** -0.25

    def __call__(self, kernels: Tensor, out: Tensor, *, normalized: bool) -> float | None:
        """The similarity of kernels, contiguous in the order of the bank, whose gradient is written to ``out``.

        Returns:
            The raw one, or the mean of the pairs' normalized ones; None where a norm is too small or
            too large for that.
        """
        # Threads share this object, which is cached, so scratch memory is each call's own; the
        # tuple keeps it alive, which an address does not.
        arrays = (kernels, out, kernels.new_empty(self._scratch_size))
        radius = self._radius if normalized else 0
        value = float(self._library.similarity(byref(self._layout), radius, *map(Tensor.data_ptr, arrays)))
        return None if value == -1 else value


@lru_cache(maxsize=16)
def _folded(kernel_size: tuple[int, ...]) -> Fourier:
    return Fourier(kernel_size, torch.float32, torch.device("cpu"), folded=True)


class CompiledBlock:
    """A `Block` for what the defaults need: float32 on the CPU, all pairs, matched channels."""

    max_weights = 2**19  # step.c takes one channel at a time into the cache: blocks only divide the work

    def __init__(
        self, part: Part, weights: Tensor, fourier: Fourier, settings: Settings, memory: threading.local
    ) -> None:
        self.part, self._memory = part, memory
        self._library = cast(ctypes.CDLL, library())
        _, group_count, channel_count, filters = self._shape = weights.shape
        self._weights = _chunked(weights)
        self._direction, self._gradient = (torch.zeros_like(self._weights) for _ in range(2))
        self._layout = _Layout.of(fourier, group_count, channel_count, filters)
        self._scratch_size = self._library.scratch_size(byref(self._layout))
        shapes = (4, group_count, filters), (), (3, 3)
        self._sums, self._grad_dot_prev, self._coefficients = (
            weights.new_empty(s, dtype=torch.float64) for s in shapes
        )

    @property
    def weights(self) -> Tensor:
        """As `Block.weights`."""
        return _unchunked(self._weights, self._shape)

    def evaluate(self, keep: Tensor, add: Tensor, shift: Tensor) -> tuple[Tensor, float]:
        """As `Block.evaluate`."""
        state = (self._weights, self._direction, self._gradient)
        arrays = (keep, add, shift, *state, self._scratch(), self._sums, self._grad_dot_prev)
        self._library.evaluate(byref(self._layout), *map(Tensor.data_ptr, arrays))
        return self._sums, float(self._grad_dot_prev)

    def turn(self, beta: float, weight_coefficient: Tensor, curvature: Tensor) -> Tensor:
        """As `Block.turn`."""
        state = (self._weights, self._gradient, self._direction)
        arrays = (weight_coefficient, curvature, *state, self._scratch(), self._coefficients)
        self._library.turn(byref(self._layout), beta, *map(Tensor.data_ptr, arrays))
        return self._coefficients

    def _scratch(self) -> Tensor:
        """Scratch memory of this thread."""
        scratch: Tensor | None = getattr(self._memory, "scratch", None)
        # The blocks of a layer differ in size, and a block may use the memory of a larger one.
        if scratch is None or len(scratch) < self._scratch_size:
            scratch = self._memory.scratch = self._weights.new_empty(self._scratch_size)
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
