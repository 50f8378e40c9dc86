"""The machine of a benchmark: what it is called, what it can do, and what a process costs on it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

COPIED = 2**28  # bytes: far more than any cache holds
SIDE = 2048  # of the matrices
CALLS = 5
PEAK_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes

Result = TypeVar("Result")

# A process starts with the peak memory of the one that started it, so a small one starts what is measured.
LAUNCHER = """
import os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(time.perf_counter() - started, usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def cpu_name() -> str:
    """Model of the processor and number of cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def file_name(cpu: str) -> str:
    """What `cpu_name` says in a file's name: ``"Intel(R) Xeon(R) CPU, 2 cores"`` becomes ``"intel-xeon-2-cores"``."""
    plain = re.sub(r"\((r|tm)\)|\b(processor|cpu)\b", " ", cpu.lower())
    return "-".join(re.findall(r"[a-z0-9.]+", plain))


def in_turn(parts: Sequence[Callable[[], Result]], repeats: int) -> list[list[Result]]:
    """Results of each part, one after the other in every round, so that a slow minute hits all alike.

    A round before the first warms up.
    """
    for part in parts:
        part()
    rounds = [[part() for part in parts] for _ in range(repeats)]
    return [list(results) for results in zip(*rounds, strict=True)]


def run(command: Sequence[str]) -> tuple[float, float]:
    """Seconds and peak memory in MiB of a process; of its children too, of which the largest counts.

    What it imports is compiled once and kept, as where a package is installed, whatever the environment says of that.
    """
    launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed: {done.stderr.strip()}")
    seconds, peak = done.stdout.split()
    return float(seconds), float(peak) * PEAK_UNIT / 2**20


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy from memory to memory with all of torch's threads."""
    source = torch.zeros(COPIED // 4)
    target = torch.zeros_like(source)
    return 2 * COPIED / _seconds(lambda: target.copy_(source))


def product_rate() -> float:
    """Floating-point operations a second of a product of two float32 matrices with all of torch's threads."""
    a, b = torch.randn(2, SIDE, SIDE)
    out = torch.empty_like(a)
    return 2 * SIDE**3 / _seconds(lambda: torch.mm(a, b, out=out))


def _seconds(work: Callable[[], object]) -> float:
    """The least of a few calls: what the machine does when it is left alone."""
    times = []
    for _ in range(CALLS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)
