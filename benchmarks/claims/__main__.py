"""Do orthogonal kernels have dissimilar feature maps, and does Convolutional Similarity lower what it says it lowers?

    pip install '.[bench]'
    python -m benchmarks.claims [--draws 2000] [--seeds 2] [--write]

Under three minutes on two cores. Two kernels and one signal first, as in the paper, then layers of a ResNet-18. With
``--write`` the tables go to ``benchmarks/results/claims.md``.
"""

from __future__ import annotations

import argparse
import time

from benchmarks.claims import pairs, real_layers
from benchmarks.machine import cpu_name
from benchmarks.page import RESULTS, Page


def main() -> None:
    parser = argparse.ArgumentParser(
        "claims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=2000, help="of two kernels and a signal (default 2000)")
    parser.add_argument("--seeds", type=int, default=2, help="of a ResNet-18 and its inputs (default 2)")
    parser.add_argument("--write", action="store_true", help="write the tables to benchmarks/results/")
    options = parser.parse_args()
    started = time.perf_counter()
    page = Page("Kernels and feature maps", f"Made by `python -m benchmarks.claims --write` on {cpu_name()}.")
    page.add(
        "",
        f"## Two kernels and one signal, {options.draws} draws",
        "",
        "Absolute cosine of the two feature maps: mean before and after, quantiles of the change, how often it rises; "
        "norm: of the kernels, after over before.",
    )
    page.head(pairs.COLUMNS)
    page.rows(pairs.rows(options.draws))
    page.add(
        "",
        f"## Layers of a ResNet-18, {options.seeds} seeds",
        "",
        "Mean absolute cosine (and correlation: centred) of every two feature maps before the activation. White and "
        "natural: noise in independent channels, too little of it to tell less than 0.006 from zero. Real: what "
        "reaches the layer from photographs. Orthogonal weights are the exact minimum of soft orthogonality's and "
        "SRIP's objectives.",
    )
    page.head(real_layers.COLUMNS)
    page.rows(real_layers.rows(options.seeds))
    page.add("", f"{time.perf_counter() - started:.0f} s.")
    if options.write:
        page.write(RESULTS / "claims.md")


if __name__ == "__main__":
    main()
