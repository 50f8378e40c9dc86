"""What the Triton kernels of `fused.py` and `fused_similarity.py` are for; known without Triton."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from convsim_init.settings import Channels, Pairs

MAX_TAPS = 9  # a thread's registers hold the spectra of no larger kernel
MAX_WEIGHTS = 2**31  # offsets are int32
OLDEST, OLDEST_TRITON = 80, (3, 3)  # compute capability 8.0; kernels with tuples


def fits(shape: Sequence[int], dtype: torch.dtype, device: torch.device, pairs: Pairs, channels: Channels) -> bool:
    """Whether they compute this for a bank ``[G, M, C, *kernel_size]``: and Triton, if it is there, compiles them."""
    usual = pairs == "all" and channels == "matched" and dtype == torch.float32 and device.type == "cuda"
    if not usual or math.prod(shape[3:]) > MAX_TAPS or math.prod(shape) >= MAX_WEIGHTS:
        return False
    try:  # Triton comes with torch's builds for CUDA, on Linux
        import triton

        # Triton tells of the current device, which need not be the bank's.
        with torch.cuda.device(device):
            target = triton.runtime.driver.active.get_current_target()
    except Exception:  # ImportError, or whatever Triton raises where it finds no C compiler or no driver
        return False
    known = tuple(map(int, triton.__version__.split(".")[:2])) >= OLDEST_TRITON
    return bool(known and target.backend == "cuda" and target.arch >= OLDEST)
