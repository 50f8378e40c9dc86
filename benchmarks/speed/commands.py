"""Rows of the speed benchmark about whole commands: time and peak memory of the process, against `import torch`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.machine import in_turn, run

Row = tuple[str, str, str, str, str]  # what, median, peer, ratio, goal

COMMAND = [sys.executable, "-m", "convsim_init"]
IMPORT_TORCH = [sys.executable, "-c", "import torch"]
IMPORT_TIMM = [sys.executable, "-c", "import torch, timm"]
SEEDS = 20
STAGES = {  # of the command, in Python
    "`import torch`": "import torch",
    "`import convsim_init`": "import convsim_init as ci; ci.initialize_, ci.build_model, ci.save_checkpoint",
    "drawing the weights": "model = ci.build_model(sys.argv[1], seed=0)",
    "`initialize_`": "report = ci.initialize_(model)",
    "writing the file": "ci.save_checkpoint(model, sys.argv[2], report=report, overwrite=True)",
}
DIVIDED = {"one": ["resnet50"], "s{seed}": ["resnet18", "--seeds", "0:8"]}  # by several processes; by names of files


class Cost(NamedTuple):
    """Seconds, and peak memory in MiB, of a process; medians."""

    seconds: float
    memory: float


def costs(commands: Sequence[Sequence[str]], repeats: int) -> list[Cost]:
    """Of commands that are run in turn."""
    results = in_turn([lambda command=command: run(command) for command in commands], repeats)
    return [Cost(*map(median, zip(*runs, strict=True))) for runs in results]


def command_rows(repeats: int) -> Iterator[Row]:
    """The whole command, and the commands that look."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "init.safetensors"
        for model, goal in (("resnet18", 2.2), ("resnet50", 3.5)):
            ours, torch = costs([[*COMMAND, model, "--out", str(out), "--force"], IMPORT_TORCH], repeats)
            ratio = ours.seconds / torch.seconds
            what = f"`convsim-init {model} --out …`"
            yield what, f"{ours.seconds:.2f} s", f"`import torch` {torch.seconds:.2f} s", f"{ratio:.2f}", f"≤ {goal}"
            yield memory_row("`import torch`", ours, torch, out, 4)
        yield inspect_row(out, repeats)
        yield from timm_rows(out, repeats)
    for argument in ("--help", "list"):
        (ours,) = costs([[*COMMAND, argument]], repeats)
        yield f"`convsim-init {argument}`", f"{ours.seconds:.3f} s", "", "", "< 0.3 s"


def memory_row(peer: str, ours: Cost, theirs: Cost, out: Path, goal: float) -> Row:
    """Peak memory beyond a peer's, over the size of the file."""
    size = out.stat().st_size / 2**20
    what = f"its peak memory beyond {peer}, over the model's {size:.0f} MiB"
    ratio = (ours.memory - theirs.memory) / size
    return what, f"{ours.memory:.0f} MiB", f"{theirs.memory:.0f} MiB", f"{ratio:.2f} times the model", f"≤ {goal}"


def stage_rows(repeats: int) -> Iterator[Row]:
    """Where the time of the command goes: its stages, called from Python."""
    timed = "started = time.perf_counter()\n{}\nprint(time.perf_counter() - started)\n"
    script = "import sys, time\n" + "".join(map(timed.format, STAGES.values()))
    with tempfile.TemporaryDirectory() as folder:
        for model in ("resnet18", "resnet50"):
            command = [sys.executable, "-c", script, model, str(Path(folder) / "init.safetensors")]
            (runs,) = in_turn([partial(subprocess.check_output, command, text=True)], repeats)
            stages = [median(map(float, seconds)) for seconds in zip(*map(str.split, runs), strict=True)]
            for stage, seconds in zip(STAGES, stages, strict=True):
                yield f"{model}: {stage}", f"{seconds:.3f} s", "", f"{seconds / sum(stages):.0%} of all", ""


def inspect_row(file: Path, repeats: int) -> Row:
    """What reading and measuring a file costs."""
    ours, torch = costs([[*COMMAND, "inspect", str(file)], IMPORT_TORCH], repeats)
    more = f"and {ours.memory - torch.memory:.0f} MiB, of which the model {file.stat().st_size / 2**20:.0f} MiB"
    seconds = f"{ours.seconds - torch.seconds:.2f} s"
    return "`convsim-init inspect` of that file, beyond `import torch`", seconds, more, "", "≤ 4 s, ≤ 1 GiB + model"


def timm_rows(out: Path, repeats: int) -> Iterator[Row]:
    """ConvNeXt-T of timm, whose own import is taken off, as it takes longer than everything else together."""
    what = "`convsim-init timm:convnext_tiny --out …`, less what `import timm` adds to `import torch`"
    imported = subprocess.run(IMPORT_TIMM, capture_output=True, text=True, check=False)
    if imported.returncode:
        yield what, f"not measured, `import timm` fails: {imported.stderr.splitlines()[-1]}", "", "", "≤ 4"
        return
    command = [*COMMAND, "timm:convnext_tiny", "--out", str(out), "--force"]
    ours, torch, timm = costs([command, IMPORT_TORCH, IMPORT_TIMM], repeats)
    seconds = ours.seconds - (timm.seconds - torch.seconds)
    peer = f"`import torch` {torch.seconds:.2f} s, `import torch, timm` {timm.seconds:.2f} s"
    yield what, f"{seconds:.2f} s", peer, f"{seconds / torch.seconds:.2f}", "≤ 4"
    yield memory_row("`import torch, timm`", ours, timm, out, 4)


def sweep_rows(repeats: int) -> Iterator[Row]:
    """Several seeds in one command against one seed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "one.safetensors"
        command = [*COMMAND, "resnet18", "--force"]
        many = [*command, "--seeds", f"0:{SEEDS}", "--out", str(Path(folder) / "s{seed}.safetensors")]
        ours, one, torch = costs([many, [*command, "--out", str(out)], IMPORT_TORCH], repeats)
        what, ratio = f"`convsim-init resnet18 --seeds 0:{SEEDS} --out …`", ours.seconds / one.seconds
        yield what, f"{ours.seconds:.2f} s", f"one seed {one.seconds:.2f} s", f"{ratio:.2f}", "≤ 12"
        yield memory_row("`import torch`", ours, torch, out, 5)


def ranks_rows(repeats: int) -> Iterator[Row]:
    """Two processes of a launcher against one of the same launcher, which has all cores for its threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for name, arguments in DIVIDED.items():
        with tempfile.TemporaryDirectory() as folder:
            folders = [Path(folder) / processes for processes in ("two", "one", "alone")]
            two, one, alone = ([*arguments, "--force", "--out", str(f / f"{name}.safetensors")] for f in folders)
            for path in folders:
                path.mkdir()
            commands = [launched(2, cores // 2 or 1, two), launched(1, cores, one), [*COMMAND, *alone]]
            ours, peer, plain = costs(commands, repeats)
            written = [{file.name: file.read_bytes() for file in path.iterdir()} for path in folders]
        equal = "equal to the byte" if written[0] == written[1] == written[2] else "different"
        what = f"`torchrun --nproc-per-node 2 -m convsim_init {' '.join(arguments)} --out …`, {cores} cores"
        seconds = f"one process {peer.seconds:.2f} s, without `torchrun` {plain.seconds:.2f} s"
        yield what, f"{ours.seconds:.2f} s", seconds, f"{ours.seconds / peer.seconds:.2f}", "≤ 1"
        yield f"its {len(written[0])} file(s) beside those of one process", equal, "", "", "equal"


def launched(processes: int, threads: int, arguments: Sequence[str]) -> list[str]:
    """Our command in so many processes of `torchrun`, which share out the cores as one would."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return ["env", f"OMP_NUM_THREADS={threads}", *torchrun, "-m", "convsim_init", *arguments]
