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

from convsim_init.backends import fused, fused_similarity

FULL, COARSE = {1: 2, 9: 16}, {1: 2, 9: 8}  # frequencies, by taps
KERNELS = [  # with their constants
    *((fused, "evaluate", {"taps": taps, "freqs": freqs, "moves": True}) for taps, freqs in FULL.items()),
    *((fused, "evaluate", {"taps": taps, "freqs": freqs, "moves": False}) for taps, freqs in FULL.items()),
    *((fused, "turn", {"taps": taps, "freqs": freqs}) for taps, freqs in COARSE.items()),
    *(
        (fused_similarity, name, {"taps": taps, "normalized": normalized})
        for name in ("fold", "unfold")
        for taps in FULL
        for normalized in (False, True)
    ),
]


def usage(kernel, constants: dict[str, int], capability: int) -> dict[str, int]:
    """Registers, and bytes spilled, of a thread."""
    kinds = dict.fromkeys([*fused.SIZES, "groups"], "i32") | {"beta": "fp32", "scales": "*fp64", "value": "*fp64"}
    kinds |= {} if constants.get("moves", "freqs" in constants) else {"sums": "*fp64"}  # those of the regularizer
    kinds |= dict.fromkeys(constants, "constexpr")
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: kinds.get(name, "*fp32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in names if name == "basis"},  # read as vectors
    )
    with contextlib.redirect_stdout(io.StringIO()) as log:
        triton.compile(source, target=GPUTarget("cuda", capability, 32), options=fused.OPTIONS)
    told = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads[^$]*Used (\d+) registers", log.getvalue())
    stores, loads, registers = map(int, told.groups())
    return {"registers": registers, "spilled": max(stores, loads)}


if __name__ == "__main__":
    knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
    for module, name, constants in KERNELS:
        used = usage(getattr(module, f"_{name}"), constants, int(sys.argv[1]))
        print(json.dumps({"kernel": name, **constants, **used}))
