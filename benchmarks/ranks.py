"""The command in one process against two that torchrun starts, in turn in the same run.

    python benchmarks/ranks.py [--repeats 3] [--model resnet50] [--seeds 8]

A process alone uses all cores; of two, each is given half of them. What torchrun itself takes, to start and to end two
processes that only import torch, is shown beside it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ALONE = [sys.executable, "-m", "convsim_init"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="medians are over so many (default 3)")
    parser.add_argument("--model", default="resnet50", help="of the single run (default resnet50)")
    parser.add_argument("--seeds", type=int, default=8, help="of the sweep, of resnet18 (default 8)")
    options = parser.parse_args()
    print("| what | one process | two | two over one | torchrun with `import torch` | two beyond that, over one |")
    print("|---|---|---|---|---|---|")
    sweep = ["resnet18", "--seeds", f"0:{options.seeds}"]
    for what, name in (([options.model], "one"), (sweep, "s{seed}")):
        with tempfile.TemporaryDirectory() as folder:
            arguments = [*what, "--out", str(Path(folder) / f"{name}.safetensors"), "--force", "--quiet"]
            nothing = Path(folder) / "nothing.py"
            nothing.write_text("import torch\n")
            commands = [
                ([*ALONE, *arguments], 1),
                ([*TORCHRUN, "-m", "convsim_init", *arguments], 2),
                ([*TORCHRUN, str(nothing)], 2),
                ([sys.executable, str(nothing)], 1),
            ]
            rows = [[seconds(command, share) for command, share in commands] for _ in range(options.repeats)]
        one, two, torchrun, torch = map(statistics.median, zip(*rows, strict=True))
        beyond = (two - torchrun + torch) / one
        print(f"| `{' '.join(what)}` | {one:.2f} s | {two:.2f} s | {two / one:.2f} | {torchrun:.2f} s | {beyond:.2f} |")


def seconds(command: list[str], share: int) -> float:
    threads = max(1, len(os.sched_getaffinity(0)) // share)
    started = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
