"""Compile what the library launches, without a GPU: registers and spills of each kernel, a line of JSON.

python aot.py 90    # for compute capability 9.0
"""

import contextlib
import io
import json
import re
import sys
import threading
from types import SimpleNamespace

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from convsim_init.backends import fused, fused_similarity
from convsim_init.functional.fourier import Fourier
from convsim_init.settings import Settings

# Banks [G, M, C, *kernel_size]. The second of each size differs in all that must not make Triton compile anew.
BANKS = [(1, 130, 33, 1, 1), (2, 64, 48, 1, 1), (1, 130, 33, 3, 3), (2, 64, 48, 9)]


def pretend_gpu(capability: int) -> None:
    """Have Triton compile for a GPU that is not there, and launch nothing."""
    module_kernel_registers_spills_threads = 1, 1, 0, 0, 1024
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            launcher_cls=lambda *args: lambda *args: None,
            utils=SimpleNamespace(
                load_binary=lambda *args: module_kernel_registers_spills_threads,
                get_device_properties=lambda device: {"max_shared_mem": 2**17},
            ),
        )
    )
    torch.cuda.device_of = contextlib.nullcontext


def launch(shape: tuple[int, ...]) -> None:
    """A step, and the regularizer raw and normalized."""
    bank = torch.rand(shape)
    fourier = Fourier(shape[3:], bank.dtype, bank.device)
    (cut,) = fourier.blocks(bank, bank.flatten(3).norm(dim=(2, 3)), bank.numel())
    block = fused.FusedBlock(*cut, fourier, Settings(), threading.local())
    factors = torch.rand(5, shape[0], 1, shape[1])
    block.evaluate(*factors[:3])
    block.turn(0.3, *factors[3:])
    for normalized in (False, True):
        fused_similarity.value_and_gradient(bank, shape, normalized=normalized)


def main() -> None:
    names: list[str] = []
    knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
    knobs.runtime.jit_post_compile_hook = lambda *, fn, **rest: names.append(fn.name.lstrip("_"))
    pretend_gpu(int(sys.argv[1]))
    with contextlib.redirect_stdout(io.StringIO()) as log:
        for shape in BANKS:
            launch(shape)
    found = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads[^$]*?Used (\d+) registers", log.getvalue())
    for name, (stores, loads, registers) in zip(names, found, strict=True):
        print(json.dumps({"kernel": name, "registers": int(registers), "spilled": max(int(stores), int(loads))}))


if __name__ == "__main__":
    main()
