"""The descent on a GPU: agreement with the CPU, time, bandwidth and the whole command, beside peers of the same run.

    PYTHONPATH=. python3 -m benchmarks.speed.gpu [--write] [--tests] [--repeats 5]

Needs torch, numpy and tqdm, and for the row of the whole command what the command needs; the package itself need not be
installed. With ``--tests`` the tests marked ``cuda`` run first (``python -m pytest -m cuda tests``). With ``--write``
the table goes to ``benchmarks/results/speed-<device>.md``. ``--device cpu --smallest 3 --repeats 1`` shows that the
script works, and nothing about a GPU. It has not been run on one yet.

A step must move, for each weight, 9 values: it reads the weight twice and writes it once, likewise the direction; it
writes and reads the gradient, and reads the one before. That is what a kernel fused by hand would move, and what the
share of the copy bandwidth is reckoned by; the operations that are launched move more, which is counted too. There is
no such kernel (in Triton, say) here: it has to win on a GPU, its compilation included, and none was at hand.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import in_turn, run
from convsim_init.layers.find import find_layers
from convsim_init.metrics.measure import measure_bank
from convsim_init.models.build import build_model
from convsim_init.optim.descent import descend
from convsim_init.optim.replay import Replay
from convsim_init.optim.stacked import Stack, descend_stacks
from convsim_init.settings import Settings

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MUST_MOVE = 9  # values a weight and step, see above
STEPS = 50
AGREE_AFTER = 10  # steps; later ones part by rounding, on one device as on two
MATRIX = {"cuda": 8192, "cpu": 512}
COPIED = {"cuda": 2**28, "cpu": 2**22}  # values

# The command from the source tree, where it is not the package convsim_init.cli yet.
COMMAND = "import sys, cli; sys.modules['convsim_init.cli'] = cli; from convsim_init.cli.main import main; main()"

Row = tuple[str, str, str, str, str]


def main() -> None:
    options = parse()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("expected a CUDA device, found none: nothing was measured (--device cpu only tries out the script)")
    if options.tests:
        subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests"], cwd=ROOT, check=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"the CPU ({platform.machine()})"
    lines = [
        f"# Speed on {name}, {datetime.date.today()}",
        "",
        f"Made by `PYTHONPATH=. python3 -m benchmarks.speed.gpu --write`; medians of {options.repeats}.",
        "",
        f"- torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}, Python {platform.python_version()}",
        f"- {platform.platform()}",
        "",
        "| what | found | peer | ratio | goal |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    compared, large = (stacks_of(model, options.smallest) for model in (options.compared, options.model))
    for rows in (
        agreement_rows(compared, device, options.compared),
        descent_rows(large, device, options.repeats, options.model),
        command_rows(options.model, device, options.repeats),
    ):
        for row in rows:
            lines.append("| " + " | ".join(row) + " |")
            print(lines[-1], flush=True)
    if options.write:
        options.results.mkdir(exist_ok=True)
        target = options.results / f"speed-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.md"
        target.write_text("\n".join(lines) + "\n")
        print(f"written to {target}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu only tries out the script")
    parser.add_argument("--compared", default="resnet18", help="model to compare with the CPU (default resnet18)")
    parser.add_argument("--model", default="resnet50", help="model to time (default resnet50)")
    parser.add_argument("--smallest", type=int, help="of each model only so many layers, the smallest")
    parser.add_argument("--repeats", type=int, default=5, help="medians are over so many (default 5)")
    parser.add_argument("--tests", action="store_true", help="run the tests marked cuda first")
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/results/")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def agreement_rows(stacks: list[list[Tensor]], device: torch.device, model: str) -> Iterator[Row]:
    """How far the layers' normalized similarities end from where they end on the CPU, one layer at a time."""
    brief = Settings(steps=AGREE_AFTER, tolerance=0)
    for settings, dtype, goal in (
        (brief, torch.float64, "≤ 1e-4"),
        (brief, torch.float32, "≤ 1e-4"),
        (Settings(), torch.float32, ""),
    ):
        cast = [[bank.to(dtype) for bank in banks] for banks in stacks]
        found = descend_stacks([[bank.to(device) for bank in banks] for banks in cast], settings)
        ours = [similarity(descent.bank) for descents in found for descent in descents]
        peers = [similarity(descend(bank, settings).bank) for banks in cast for bank in banks]
        apart = [abs(a / b - 1) for a, b in zip(ours, peers, strict=True)]
        ratio = f"layers apart by {max(apart):.1e} at most, {statistics.median(apart):.1e} in the median"
        if dtype == torch.float32:  # how much of that is rounding: as far as the CPU is from itself
            exact = [similarity(descend(bank.double(), settings).bank) for banks in cast for bank in banks]
            rounding = max(abs(a / b - 1) for a, b in zip(peers, exact, strict=True))
            ratio += f"; the CPU in {dtype_name(dtype)} from itself in float64 by {rounding:.1e} at most"
        yield (
            f"{model}, {settings.steps} steps, tolerance {settings.tolerance:g}, {dtype_name(dtype)}: "
            "mean normalized similarity",
            f"{statistics.fmean(ours):.4e}",
            f"CPU {statistics.fmean(peers):.4e}",
            ratio,
            goal,
        )


def similarity(bank: Tensor) -> float:
    return measure_bank(bank.cpu().double())["normalized_similarity"]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def descent_rows(stacks: list[list[Tensor]], device: torch.device, repeats: int, model: str) -> Iterator[Row]:
    """The descent of a model's layers: time, bytes, operations, memory."""
    stacks = [[bank.to(device) for bank in banks] for banks in stacks]
    weights = sum(bank.numel() for banks in stacks for bank in banks)
    for settings in (Settings(steps=STEPS), Settings(steps=STEPS, tolerance=0)):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            held = torch.cuda.memory_allocated(device)
        whole = statistics.median(timed(lambda s=settings: descend_stacks(stacks, s), device, repeats))
        yield (
            f"{model}, descent of {weights / 1e6:.1f} M weights in {len(stacks)} stacks, "
            f"tolerance {settings.tolerance:g}, set-up and capture included",
            f"{1e3 * whole:.1f} ms",
            "",
            "",
            "≤ 60 ms" if settings.tolerance else "",
        )
    if device.type == "cuda":
        peak = (torch.cuda.max_memory_allocated(device) - held) / 2**20
        yield ("its peak memory", f"{peak:.0f} MiB", f"the weights {4 * weights / 2**20:.0f} MiB", "", "")

    step, eager, captured, launches, moved, flops = step_figures(stacks, device, repeats)
    copied, products = copy_bandwidth(device, repeats), matrix_speed(device, repeats)
    must = 4 * MUST_MOVE * weights
    yield (
        f"{STEPS} iterations of all stacks, tolerance 0, after set-up",
        f"{1e3 * STEPS * step:.1f} ms",
        f"launched one by one {1e3 * STEPS * eager:.1f} ms",
        f"{eager / step:.2f} times as fast",
        "≤ 60 ms",
    )
    yield (
        "launches an iteration",
        f"{len(stacks)} graphs" if captured else f"{launches}, no graphs",
        f"{launches} operations",
        "",
        "",
    )
    yield (
        f"bytes that a step must move, {MUST_MOVE} values a weight: {must / 1e9:.2f} GB",
        f"{must / step / 1e9:.0f} GB/s",
        f"copy {copied / 1e9:.0f} GB/s",
        f"{100 * must / step / copied:.0f} %",
        "≥ 30 %",
    )
    yield (
        f"bytes that its operations move, by their tensors: {moved / 1e9:.2f} GB",
        f"{moved / step / 1e9:.0f} GB/s",
        f"copy {copied / 1e9:.0f} GB/s",
        f"{100 * moved / step / copied:.0f} %",
        "",
    )
    yield (
        "arithmetic of its matrix products",
        f"{flops / step / 1e9:.0f} Gflop/s",
        f"product of {MATRIX[device.type]}×{MATRIX[device.type]} matrices {products / 1e9:.0f} Gflop/s",
        f"{100 * flops / step / products:.1f} %",
        "",
    )


def command_rows(model: str, device: torch.device, repeats: int) -> Iterator[Row]:
    """The whole command against `import torch` and the start of the device."""
    start = f"import torch; torch.ones(1, device={device.type!r}).sum().item()"
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "init.safetensors")
        command = [sys.executable, "-c", COMMAND, model, "--device", device.type, "--out", out, "--force", "--quiet"]
        tried = subprocess.run(command, capture_output=True, text=True)
        if tried.returncode:
            reason = (tried.stderr.strip().splitlines() or ["no message"])[-1]
            yield f"`convsim-init {model}`", "not measured", f"it failed: {reason}", "", "≤ 1.5"
            return
        ours, peer = in_turn([lambda: run(command)[0], lambda: run([sys.executable, "-c", start])[0]], repeats)
    seconds, peer_seconds = statistics.median(ours), statistics.median(peer)
    yield (
        f"`convsim-init {model} --device {device.type} --out …`",
        f"{seconds:.2f} s",
        f"`import torch` and the first kernel {peer_seconds:.2f} s",
        f"{seconds / peer_seconds:.2f}",
        "≤ 1.5",
    )


def stacks_of(model: str, smallest: int | None) -> list[list[Tensor]]:
    """The filter banks of a model by equal shape, the same on every run."""
    banks = [layer.bank().detach() for layer in find_layers(build_model(model, seed=0))]
    stacks = defaultdict(list)
    for bank in sorted(banks, key=torch.numel)[:smallest]:
        stacks[bank.shape].append(bank)
    return list(stacks.values())


@torch.no_grad()
def step_figures(
    stacks: list[list[Tensor]], device: torch.device, repeats: int
) -> tuple[float, float, bool, int, int, int]:
    """What one iteration of all stacks takes.

    Returns:
        Seconds as graphs and launched one by one; whether there are graphs; and its operations, bytes and flops.
    """
    settings = Settings(steps=10**4, tolerance=0)
    running = [Stack(banks, settings) for banks in stacks]
    replays = [Replay(stack.iterate, device) for stack in running]

    def by_graphs() -> None:
        for replay in replays:
            replay(STEPS)
        for replay in replays:
            replay.wait()

    def one_by_one() -> None:
        for _ in range(STEPS):
            for stack in running:
                stack.iterate()

    traffic, flops = Traffic(), FlopCounterMode(display=False)
    with traffic, flops:
        for stack in running:
            stack.iterate()
    graphs, eager = (statistics.median(timed(work, device, repeats)) / STEPS for work in (by_graphs, one_by_one))
    captured = all(replay.captured for replay in replays)
    return graphs, eager, captured, traffic.operations, traffic.bytes, flops.get_total_flops()


class Traffic(TorchDispatchMode):
    """Counts operations that launch a kernel, and the bytes of the tensors that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        read = tensors_in([*args, *(value for name, value in (kwargs or {}).items() if name != "out")])
        written = tensors_in([result])
        places = {tensor.untyped_storage().data_ptr() for tensor in read}
        view = not function._schema.is_mutable and any(t.untyped_storage().data_ptr() in places for t in written)
        if not view and "empty" not in function.overloadpacket.__name__:
            self.operations += 1
            moved = [*{id(tensor): tensor for tensor in read}.values(), *written]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in moved)
        return result


def tensors_in(values: list) -> list[Tensor]:
    found = []
    for value in values:
        found += [value] if isinstance(value, Tensor) else tensors_in(value) if isinstance(value, (list, tuple)) else []
    return found


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes per second read and written by a copy within the device's memory."""
    source = torch.ones(COPIED[device.type], device=device)
    target = torch.empty_like(source)
    return 2 * 4 * len(source) / min(timed(lambda: target.copy_(source), device, repeats))


def matrix_speed(device: torch.device, repeats: int) -> float:
    """Flops per second of a product of large float32 matrices."""
    side = MATRIX[device.type]
    matrix = torch.ones(side, side, device=device)
    return 2 * side**3 / min(timed(lambda: matrix @ matrix, device, repeats))


def timed(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each repetition, by the device's own clock where it has one, after one to warm up."""
    work()
    seconds = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            start.record()
            work()
            end.record()
            torch.cuda.synchronize(device)
            seconds.append(start.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    main()
