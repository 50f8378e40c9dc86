"""Compile the fused kernels ahead of time, without a GPU: registers and spills of each, a line of JSON.

TRITON_ALWAYS_COMPILE=1 TRITON_DUMP_PTXAS_LOG=1 python aot.py 90    # for compute capability 9.0
"""

import contextlib
import io
import json
import re
import sys

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from convsim_init.backends import fused

KERNELS = {"evaluate": (fused._evaluate, {1: 2, 9: 16}), "turn": (fused._turn, {1: 2, 9: 8})}  # frequencies, by taps


def usage(kernel, taps: int, frequencies: int, capability: int) -> dict[str, int]:
    """Registers, and bytes spilled, of a thread."""
    constants = {"taps": taps, "freqs": frequencies}
    kinds = dict.fromkeys(fused.SIZES, "i32") | {"beta": "fp32"} | dict.fromkeys(constants, "constexpr")
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: kinds.get(name, "*fp32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index("basis"),): [["tt.divisibility", 16]]},  # read as vectors
    )
    with contextlib.redirect_stdout(io.StringIO()) as log:
        triton.compile(source, target=GPUTarget("cuda", capability, 32), options=fused.OPTIONS)
    told = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads[^$]*Used (\d+) registers", log.getvalue())
    stores, loads, registers = map(int, told.groups())
    return {"registers": registers, "spilled": max(stores, loads)}


if __name__ == "__main__":
    knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
    for name, (kernel, sizes) in KERNELS.items():
        for taps, frequencies in sizes.items():
            used = usage(kernel, taps, frequencies, int(sys.argv[1]))
            print(json.dumps({"kernel": name, "taps": taps, **used}))
