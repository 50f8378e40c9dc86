"""Time and memory of the command and of a descent step, each against a peer measured in turn in the same run.

    python benchmarks/speed.py [--repeats 5] [--write]

Ratios carry over from machine to machine, seconds do not. With ``--write`` the table goes to ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F

from convsim_init.descent import descend
from convsim_init.devices import describe_environment
from convsim_init.parallel import Team
from convsim_init.settings import Settings
from convsim_init.similarity import filter_bank

RESULTS = Path(__file__).parent / "results"
IMPORT_TORCH = [sys.executable, "-c", "import torch"]
FEW_STEPS, MANY_STEPS = 4, 24
SEEDS = 20
TARGET = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="medians are over so many (default 5)")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"of the sweep (default {SEEDS})")
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/results/")
    options = parser.parse_args()
    lines = [
        f"# Speed on {cpu_name()}, {datetime.date.today()}",
        "",
        "Made by `python benchmarks/speed.py --write`; medians of " + f"{options.repeats}, peers in turn.",
        "",
        *(f"- {name}: {value}" for name, value in describe_environment().items()),
        "",
        "| what | median | peer | ratio | goal |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for part in (command_rows, partial(sweep_rows, seeds=options.seeds), step_rows, target_rows, scaling_rows):
        for row in part(options.repeats):
            lines.append("| " + " | ".join(row) + " |")
            print(lines[-1], flush=True)
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        target = RESULTS / "speed-cpu.md"
        target.write_text("\n".join(lines) + "\n")
        print(f"written to {target}")


def command_rows(repeats: int):
    """The whole command against `import torch`, time and peak memory of the process."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "init.safetensors")
        command = [sys.executable, "-m", "convsim_init"]
        for model, goal in (("resnet18", 3), ("resnet50", 5)):
            write = [*command, model, "--out", out, "--force"]
            ours, peer = in_turn([lambda w=write: run(w), lambda: run(IMPORT_TORCH)], repeats)
            seconds, peer_seconds = (statistics.median(s for s, _ in part) for part in (ours, peer))
            memory, peer_memory = (statistics.median(m for _, m in part) for part in (ours, peer))
            size = Path(out).stat().st_size / 2**20
            yield (
                f"`convsim-init {model} --out …`",
                f"{seconds:.2f} s",
                f"`import torch` {peer_seconds:.2f} s",
                f"{seconds / peer_seconds:.2f}",
                f"≤ {goal}",
            )
            yield (
                f"its peak memory beyond `import torch`, over the model's {size:.0f} MiB",
                f"{memory:.0f} MiB",
                f"{peer_memory:.0f} MiB",
                f"{(memory - peer_memory) / size:.2f}",
                "≤ 6",
            )
        ours, peer = in_turn([lambda: run([*command, "inspect", out]), lambda: run(IMPORT_TORCH)], repeats)
        beyond = [statistics.median(r[i] for r in ours) - statistics.median(r[i] for r in peer) for i in range(2)]
        yield (
            "`convsim-init inspect` of that file, beyond `import torch`",
            f"{beyond[0]:.2f} s",
            f"and {beyond[1]:.0f} MiB, of which the model {size:.0f} MiB",
            "",
            "≤ 4 s, ≤ 1 GiB + model",
        )
        for arguments in (["--help"], ["list"]):
            times = [run([*command, *arguments])[0] for _ in range(repeats)]
            yield (f"`convsim-init {arguments[0]}`", f"{statistics.median(times):.3f} s", "", "", "< 0.3 s")


def sweep_rows(repeats: int, seeds: int):
    """Several seeds in one command against one seed, time and peak memory of the process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "convsim_init", "resnet18", "--force"]
        many = [*command, "--seeds", f"0:{seeds}", "--out", str(Path(folder) / "s{seed}.safetensors")]
        one = [*command, "--out", str(Path(folder) / "one.safetensors")]
        parts = [lambda: run(many), lambda: run(one), lambda: run(IMPORT_TORCH)]
        medians = [
            [statistics.median(column) for column in zip(*part, strict=True)] for part in in_turn(parts, repeats)
        ]
        (seconds, memory), (one_seconds, _), (_, torch_memory) = medians
        size = Path(one[-1]).stat().st_size / 2**20
    yield (
        f"`convsim-init resnet18 --seeds 0:{seeds} --out …`",
        f"{seconds:.2f} s",
        f"one command {one_seconds:.2f} s",
        f"{seconds / one_seconds:.2f}",
        f"≤ 12 for {SEEDS}",
    )
    yield (
        f"its peak memory beyond `import torch`, over the model's {size:.0f} MiB",
        f"{memory:.0f} MiB",
        f"{torch_memory:.0f} MiB",
        f"{(memory - torch_memory) / size:.2f}",
        "≤ 5",
    )


def step_rows(repeats: int):
    """One step on 512x512x3x3 against what one writes first: adjacent pairs by grouped conv2d, autograd and Adam."""
    weight = torch.nn.init.kaiming_normal_(torch.empty(512, 512, 3, 3))
    ours, peer = in_turn([lambda: time_descent(weight), lambda: time_adjacent_step(weight)], repeats)
    yield (
        "one step on 512×512×3×3, all pairs",
        f"{1e3 * statistics.median(ours):.1f} ms",
        f"grouped conv2d, autograd, Adam, adjacent pairs {1e3 * statistics.median(peer):.0f} ms",
        f"{statistics.median(peer) / statistics.median(ours):.1f} times as fast",
        "≥ 12",
    )


def target_rows(repeats: int):
    """Time to a tenth of the normalized similarity, against Adam on the same objective by rFFT and autograd."""
    weight = torch.nn.init.kaiming_normal_(torch.empty(128, 128, 3, 3))
    ours, peer = in_turn([lambda: time_to_target(weight), lambda: time_adam_to_target(weight)], repeats)
    yield (
        "128×128×3×3 to 10 % of its normalized similarity",
        f"{1e3 * statistics.median(ours):.0f} ms",
        f"rFFT, autograd, Adam(0.002), norms restored {statistics.median(peer):.2f} s",
        f"{statistics.median(peer) / statistics.median(ours):.0f} times as fast",
        "",
    )


def scaling_rows(repeats: int):
    """Time against the number of filters M at fixed input channels."""
    sizes = (256, 512, 1024)
    weights = [torch.nn.init.kaiming_normal_(torch.empty(filters, 256, 3, 3)) for filters in sizes]
    medians = [statistics.median(t) for t in in_turn([lambda w=w: time_descent(w) for w in weights], repeats)]
    for (small, large), (before, after) in zip(pairwise(sizes), pairwise(medians), strict=True):
        yield (
            f"one step on {large}×256×3×3",
            f"{1e3 * after:.1f} ms",
            f"on {small}×256×3×3 {1e3 * before:.1f} ms",
            f"{after / before:.2f}",
            "≤ 2.3",
        )


def time_descent(weight: torch.Tensor) -> float:
    """Seconds a step of the default descent: what further steps take, so without the set-up of the first."""
    seconds = []
    with Team(torch.get_num_threads()) as team:
        for steps in (FEW_STEPS, MANY_STEPS):
            started = time.perf_counter()
            descent = descend(filter_bank(weight), Settings(steps=steps, tolerance=0), team=team)
            seconds.append(time.perf_counter() - started)
            assert descent.steps == steps, "a descent that ended early would look fast"
    return (seconds[1] - seconds[0]) / (MANY_STEPS - FEW_STEPS)


def time_to_target(weight: torch.Tensor) -> float:
    """Seconds of the default descent, set-up included, with as many steps as reach the target."""
    bank = filter_bank(weight)
    losses = descend(bank, Settings(tolerance=0)).losses
    needed = next(step for step, loss in enumerate(losses) if loss <= TARGET * losses[0])
    started = time.perf_counter()
    with Team(torch.get_num_threads()) as team:
        descend(bank, Settings(steps=needed, tolerance=0), team=team)
    return time.perf_counter() - started


def time_adam_to_target(weight: torch.Tensor) -> float:
    """Seconds of Adam on all pairs' similarity by rFFT, filters rescaled to their norms after every step."""
    norms = torch.linalg.vector_norm(weight, dim=(1, 2, 3), keepdim=True)
    unit = (weight / norms).requires_grad_()
    adam = torch.optim.Adam([unit], lr=0.002 / float(norms.mean()))  # in the layer's own scale
    started, first = time.perf_counter(), None
    while True:
        loss = rfft_similarity(unit)
        first = loss.item() if first is None else first
        if loss.item() <= TARGET * first:
            return time.perf_counter() - started
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            unit /= torch.linalg.vector_norm(unit, dim=(1, 2, 3), keepdim=True)


def rfft_similarity(weight: torch.Tensor) -> torch.Tensor:
    """All pairs' similarity from power spectra, as one writes it with torch.fft."""
    lattice = [2 * k - 1 for k in weight.shape[2:]]
    power = torch.fft.rfft2(weight, s=lattice).abs().square()  # [M, C, 5, 3]
    columns = torch.full((power.shape[-1],), 2.0)
    columns[0] = 1
    pairs = power.sum(0).square() - power.square().sum(0)
    return (pairs * columns).sum() / 2 / (lattice[0] * lattice[1])


def time_adjacent_step(weight: torch.Tensor) -> float:
    """Seconds a step of the plain port of the published recipe, after one to warm up."""
    weight = weight.clone().requires_grad_()
    adam = torch.optim.Adam([weight], lr=0.002)
    steps = 2
    for step in range(1 + steps):
        if step == 1:
            started = time.perf_counter()
        adam.zero_grad()
        adjacent_similarity(weight).backward()
        adam.step()
    return (time.perf_counter() - started) / steps


def adjacent_similarity(weight: torch.Tensor) -> torch.Tensor:
    """Cross-correlations of the kernels of filters i and i + 1, every channel a group of one convolution."""
    first, second = weight[:-1].flatten(0, 1), weight[1:].flatten(0, 1)  # [pairs * C, kH, kW]
    padding = [k - 1 for k in weight.shape[2:]]
    return F.conv2d(first[None], second[:, None], padding=padding, groups=len(first)).square().sum()


def in_turn(parts: Sequence[Callable[[], object]], repeats: int) -> list[list]:
    """Results of each part, one after the other in every round, so that a slow minute hits all alike."""
    for part in parts:
        part()
    rounds = [[part() for part in parts] for _ in range(repeats)]
    return [list(results) for results in zip(*rounds, strict=True)]


def run(command: Sequence[str]) -> tuple[float, float]:
    """Seconds and peak memory in MiB of a process."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        sys.exit(f"{' '.join(command)} failed: {process.stderr.read().decode()}")
    process.stderr.close()
    return seconds, usage.ru_maxrss / 1024


def cpu_name() -> str:
    """Model of the processor and number of cores."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else 'a CPU'}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
