"""Do orthogonal kernels have dissimilar feature maps, and does Convolutional Similarity lower what it says it lowers?

    pip install '.[bench]'
    python -m benchmarks.claims [--draws 2000] [--seeds 2] [--write]

Under three minutes on two cores. Two kernels and one signal first, as in the paper, then layers of a ResNet-18. With
``--write`` the tables go to ``benchmarks/results/claims.md``.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.claims import pairs, real_layers
from benchmarks.machine import cpu_name
from convsim_init.devices import describe_environment

RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    parser = argparse.ArgumentParser(
        "claims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=2000, help="of two kernels and a signal (default 2000)")
    parser.add_argument("--seeds", type=int, default=2, help="of a ResNet-18 and its inputs (default 2)")
    parser.add_argument("--write", action="store_true", help="write the tables to benchmarks/results/")
    options = parser.parse_args()
    lines: list[str] = []
    started = time.perf_counter()

    def say(line: str = "") -> None:
        lines.append(line)
        print(line, flush=True)

    say(f"# Kernels and feature maps, {datetime.date.today()}")
    say()
    say(f"Made by `python -m benchmarks.claims --write` on {cpu_name()}.")
    say()
    for name, value in describe_environment().items():
        say(f"- {name}: {value}")
    say()
    say(f"## Two kernels and one signal, {options.draws} draws")
    say()
    say(
        "Absolute cosine of the two feature maps: mean before and after, quantiles of the change, how often it rises; "
        "norm: of the kernels, after over before."
    )
    say()
    show(say, pairs.COLUMNS, pairs.rows(options.draws))
    say()
    say(f"## Layers of a ResNet-18, {options.seeds} seeds")
    say()
    say(
        "Mean absolute cosine (and correlation: centred) of every two feature maps before the activation. White and "
        "natural: noise in independent channels, too little of it to tell less than 0.006 from zero. Real: what "
        "reaches the layer from photographs. Orthogonal weights are the exact minimum of soft orthogonality's and "
        "SRIP's objectives."
    )
    say()
    show(say, real_layers.COLUMNS, real_layers.rows(options.seeds))
    say()
    say(f"{time.perf_counter() - started:.0f} s.")
    if options.write:
        target = RESULTS / "claims.md"
        target.write_text("\n".join(lines) + "\n")
        print(f"written to {target}", file=sys.stderr)


def show(say, columns: list[str], rows: Iterable[list[str]]) -> None:
    """A table in Markdown, row by row as they come."""
    say("| " + " | ".join(columns) + " |")
    say("|---" * len(columns) + "|")
    for row in rows:
        say("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
