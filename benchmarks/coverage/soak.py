"""Initialize small models many times in one process: what grows, and whether threads disturb each other.

    python -m benchmarks.coverage.soak [--runs 2000] [--write]

Prints resident memory, open files and threads after the first tenth of the runs and after all; the status is 1 if
memory grew by more than 1 %, or files or threads by any. With ``--write`` the result goes to ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

import convsim_init as ci
from benchmarks.machine import cpu_name
from benchmarks.page import RESULTS, Page

GROWTH = 0.01
SETTINGS = ci.Settings(steps=5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000, help="how many (default 2000)")
    parser.add_argument("--write", action="store_true", help="write the result to benchmarks/results/")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run_many(max(options.runs // 10, 1), Path(folder))
        before = usage()
        run_many(options.runs, Path(folder))
        after = usage()
    growth = after["KiB of memory"] / before["KiB of memory"] - 1
    steady = growth <= GROWTH and all(after[name] <= before[name] for name in ("open files", "threads"))
    same = as_in_turn(threads=4, models=12)
    page = Page(
        f"{options.runs} initializations in one process",
        f"Made by `python -m benchmarks.coverage.soak --write` on {cpu_name()}. Each run draws a model of four layers, "
        "initializes it, writes it and reads it.",
    )
    page.head(["", f"after the first {max(options.runs // 10, 1)}", f"after {options.runs} more"])
    page.rows([name, str(before[name]), str(after[name])] for name in before)
    page.add(
        "",
        f"Memory grew by {growth:.2%}. From four threads at once, twelve models came out "
        f"{'to the bit as' if same else 'OTHER than'} in turn.",
    )
    if options.write:
        page.write(RESULTS / "soak.md")
    return int(not (steady and same))


def drawn(seed: int) -> nn.Sequential:
    """A model of a normal, a grouped, a transposed and a pointwise convolution."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3, groups=2), nn.ConvTranspose2d(32, 8, 2), nn.Conv2d(8, 8, 1)
        )


def run_many(runs: int, folder: Path) -> None:
    """Initialize, write and measure that many models."""
    path = folder / "init.safetensors"
    for seed in range(runs):
        model = drawn(seed)
        report = ci.initialize_(model, settings=SETTINGS)
        ci.save_checkpoint(model, path, report=report, overwrite=True)
        ci.measure(model)


def usage() -> dict[str, int]:
    """What this process holds."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "KiB of memory": pages * os.sysconf("SC_PAGE_SIZE") // 1024,
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "Python threads": threading.active_count(),
    }


def as_in_turn(threads: int, models: int) -> bool:
    """Whether models initialized from several threads at once come out as in turn."""

    def initialized(model: nn.Module) -> Tensor:
        ci.initialize_(model, settings=SETTINGS)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    in_turn = [initialized(drawn(seed)) for seed in range(models)]
    drawn_again = [drawn(seed) for seed in range(models)]  # the random state is everyone's: not from the threads
    with ThreadPoolExecutor(threads) as pool:
        at_once = list(pool.map(initialized, drawn_again))
    return all(torch.equal(one, other) for one, other in zip(in_turn, at_once, strict=True))


if __name__ == "__main__":
    sys.exit(main())
