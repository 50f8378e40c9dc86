"""Kill one process of a command under torchrun at random moments, and see how the others end.

    python tests/fuzz/ranks.py [--kills 100] [--within 8.0] [--seed 0]

After the kill (SIGKILL) torchrun and the other process must end within 30 seconds and two seconds of CPU time, the
latter with one line or nothing, and leave the old file or the whole new one, nothing else and no process. Prints the
counts as JSON; the status is 1 if any ended otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from signals import ARGUMENTS, cpu_time, write_both

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
COMMAND = ["-m", "convsim_init"]
PATIENCE = 30  # seconds from the kill to the end of torchrun
MOST_CPU = 2  # seconds from the kill to the end, torchrun's own among them
FAULTS = ("hanging", "processes left", "other tracebacks", "lines of two", "too long at work", "litter", "damaged")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="how many (default 100)")
    parser.add_argument("--within", type=float, default=8.0, help="seconds from the start to the kill, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    counts: Counter[str] = Counter({"kills": 0, **dict.fromkeys(FAULTS, 0)})
    slowest = longest = 0.0
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "init.safetensors")
        old, whole = write_both([sys.executable, *COMMAND], path)
        while counts["kills"] < options.kills:
            path.write_bytes(old)
            end = one(path, chance.uniform(0, options.within), chance.randrange(2))
            if end is None:
                counts["had ended, or not begun"] += 1
                continue
            status, seconds, cpu, error, left = end
            slowest, longest = max(slowest, seconds), max(longest, cpu)
            counts["kills"] += 1
            counts[f"status {status}"] += 1
            counts["told in a line"] += ("\n" + error).count("\nError: ") == 1
            counts["hanging"] += status is None
            counts["processes left"] += left
            counts["other tracebacks"] += error.count("Traceback") > error.count("ChildFailedError: ")
            counts["lines of two"] += ("\n" + error).count("\nError: ") > 1
            counts["too long at work"] += cpu > MOST_CPU
            counts["litter"] += os.listdir(folder) != [path.name]
            counts["damaged"] += hashlib.sha256(path.read_bytes()).digest() not in whole
    slowness = {"most seconds to the end": round(slowest, 1), "most of CPU time": round(longest, 2)}
    print(json.dumps(counts | slowness))
    return int(any(counts[name] for name in FAULTS))


def one(path: Path, delay: float, rank: int) -> tuple[int | None, float, float, str, int] | None:
    """Kill a rank after a while: the status of torchrun, seconds and CPU time to its end, stderr, processes left.

    The status is None if torchrun had to be killed too; all is None if there was no rank to kill.
    """
    before = used_by_children()
    with tempfile.TemporaryFile("w+") as stderr:
        command = [*TORCHRUN, *COMMAND, *ARGUMENTS, str(path)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            time.sleep(delay)
            ranks = children(process.pid)
            used = [cpu_time(each) for each in (process.pid, *ranks)]
            if len(ranks) < 2 or None in used:
                return None
            os.kill(ranks[rank], signal.SIGKILL)
            killed = time.perf_counter()
            try:
                status: int | None = process.wait(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                status = None
        finally:
            process.kill()
            process.wait()
        seconds = time.perf_counter() - killed
        left = sum(cpu_time(each) is not None for each in ranks)
        stderr.seek(0)
        return status, seconds, max(0.0, used_by_children() - before - sum(filter(None, used))), stderr.read(), left


def children(process: int) -> list[int]:
    """Processes that a process has started, in the order of their numbers."""
    try:
        return sorted(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))
    except OSError:
        return []


def used_by_children() -> float:
    """Seconds of CPU time of all children that have ended, theirs included."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    sys.exit(main())
