"""Kill, at random moments, processes that overwrite a file, and see what is left of it.

    python tests/fuzz/kills.py [--kills 1000] [--folder PATH] [--seed 0]

After each kill the file must be one of the two whole ones that are being written, and after the next run its folder
must hold nothing else. Prints the counts as JSON; the status is 1 if a file was damaged or litter was left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

import convsim_init as ci

NAMES = ("init.safetensors", "init.pt")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="how many (default 1000)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a new temporary folder)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.folder or Path(tempfile.mkdtemp())
    folder.mkdir(exist_ok=True)
    chance = random.Random(options.seed)
    states = [{"w": torch.full((100, 3, 20, 20), value)} for value in (1.0, 2.0)]
    counts = {"kills": 0, "in the middle of a write": 0, "damaged files": 0, "folders with litter": 0}
    for name in NAMES:
        path = folder / name
        whole = set()
        for state in states:
            ci.save_checkpoint(state, path, overwrite=True)
            whole.add(path.read_bytes())
        for _ in range(options.kills // len(NAMES)):
            kill_a_writer(states, path, chance.uniform(0, 0.02))
            counts["kills"] += 1
            counts["in the middle of a write"] += len(os.listdir(folder)) > 1
            counts["damaged files"] += path.read_bytes() not in whole
            ci.save_checkpoint(states[0], path, overwrite=True)
            counts["folders with litter"] += os.listdir(folder) != [name]
        path.unlink()
    print(json.dumps(counts))
    return int(bool(counts["damaged files"] or counts["folders with litter"]))


def kill_a_writer(states: list[dict[str, torch.Tensor]], path: Path, seconds: float) -> None:
    """Fork a process that writes the states in turn, and kill it that long after its first write began."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(tell, b"!")
        while True:
            for state in states:
                ci.save_checkpoint(state, path, overwrite=True)
    os.read(ready, 1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(ready)
    os.close(tell)


if __name__ == "__main__":
    sys.exit(main())
