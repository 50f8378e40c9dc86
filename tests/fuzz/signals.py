"""Send signals at random moments to commands that run, one or two each, and see how they end.

    python tests/fuzz/signals.py [--signals 100] [--within 3.0] [--seed 0]

A command must end by the signal's status or, if the signal came after its work, as usual; without a traceback, within a
second of CPU time, and leaving the old file or the whole new one and nothing else. Half of the signals are SIGINT, half
SIGTERM; after half of them a second one follows within 50 ms. What Python says of a signal while it starts, before a
line of the command has run, is counted apart. Prints the counts as JSON; the status is 1 if any command ended
otherwise.
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

SCRIPT = Path(sys.executable).with_name("convsim-init")
ARGUMENTS = ["cifar_resnet18", "--steps", "400", "--pairs", "adjacent", "--force", "--out"]
NUMBERS = (signal.SIGINT, signal.SIGTERM)
FIRST_LINE = str(Path("cli", "main.py"))
STARTING = "Fatal Python error: init_import_site"
FAULTS = ("tracebacks", "other words", "other statuses", "over a second", "litter", "damaged")
TICKS = os.sysconf("SC_CLK_TCK")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signals", type=int, default=100, help="how many commands (default 100)")
    parser.add_argument("--within", type=float, default=3.0, help="seconds from the start to the signal, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    counts: Counter[str] = Counter()
    longest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "init.safetensors")
        old, whole = write_both([str(SCRIPT)], path)
        for _ in range(options.signals):
            path.write_bytes(old)
            delay = chance.uniform(0, options.within)
            numbers = [chance.choice(NUMBERS) for _ in range(chance.choice((1, 2)))]
            status, error, cpu = one(path, delay, numbers, chance.uniform(0, 0.05))
            longest = max(longest, cpu)
            counts["commands"] += 1
            counts["with two signals"] += len(numbers) == 2
            counts[f"status {status}"] += 1
            if STARTING in error or ("Traceback" in error and FIRST_LINE not in error):
                counts["Python had not started"] += 1
                continue
            told = ("", *(f"Error: {word}; no partial file is left\n" for word in ("interrupted", "terminated")))
            counts["tracebacks"] += "Traceback" in error
            counts["other words"] += error not in told
            counts["other statuses"] += status not in (0, 130, 143, -signal.SIGINT, -signal.SIGTERM)
            counts["over a second"] += cpu > 1
            counts["litter"] += os.listdir(folder) != [path.name]
            counts["damaged"] += hashlib.sha256(path.read_bytes()).digest() not in whole
            if error not in told:
                print(f"after {delay:.3f} s, {numbers}: {error}", file=sys.stderr)
    print(json.dumps(counts | {"most seconds of CPU time from signal to end": round(longest, 2)}))
    return int(any(counts[name] for name in FAULTS))


def write_both(program: list[str], path: Path) -> tuple[bytes, set[bytes]]:
    """The file that is there before, and the digests of that and of the one that a command writes in its place."""
    whole = set()
    for arguments in (ARGUMENTS, ["cifar_resnet18", "--steps", "1", "--force", "--out"]):
        subprocess.run([*program, *arguments, str(path)], check=True, stdout=subprocess.DEVNULL)
        old = path.read_bytes()
        whole.add(hashlib.sha256(old).digest())
    return old, whole


def one(path: Path, delay: float, numbers: list[int], pause: float) -> tuple[int, str, float]:
    """Status, stderr, and CPU time from the first signal on of a command that gets these."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen([SCRIPT, *ARGUMENTS, path], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    time.sleep(delay)
    used = cpu_time(process.pid)
    for number in numbers:
        process.send_signal(number)
        time.sleep(pause)
    _, error = process.communicate(timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = sum(getattr(after, name) - getattr(before, name) for name in ("ru_utime", "ru_stime"))
    return process.returncode, error, max(0.0, total - used) if used is not None else 0.0


def cpu_time(process: int) -> float | None:
    """Seconds that a process has used; None if it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / TICKS if fields[0] != "Z" else None


if __name__ == "__main__":
    sys.exit(main())
