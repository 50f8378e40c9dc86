"""What `ConvolutionalSimilarity` costs in a step of training: with and without it, in turn, at batch 64.

    python -m benchmarks.speed.regularizer [--repeats 60] [--threads 1] [--write]

Seconds on the wall, all cores at work unless ``--threads`` says otherwise. Steps are taken in turn; what a term costs
is the median of the differences to the step without it in the same round. With ``--write`` the table goes to
``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

import convsim_init as ci
from benchmarks.machine import cpu_name
from benchmarks.page import RESULTS, Page
from benchmarks.training.networks import NETWORKS

BATCH = 64
COLUMNS = (
    *("network", "input", "convolution weights"),
    *("step without", "with, raw", "more", "with, normalized", "more"),
)
CASES = {"resnet": (3, 32), "vgg": (3, 32), "cifar_resnet18": (3, 32)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=60, help="of each step, a tenth for cifar_resnet18 (default 60)")
    parser.add_argument("--networks", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="default: as many as there are cores"
    )
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/results/")
    options = parser.parse_args()
    if options.write and options.networks != list(CASES):
        parser.error("--write wants all networks")
    torch.set_num_threads(options.threads)
    page = Page(
        f"Cost of the regularizer on {cpu_name()}",
        f"Made by `python -m benchmarks.speed.regularizer --repeats {options.repeats} --threads {options.threads} "
        "--write`: a step of SGD at batch 64, medians of many steps in turn; of the costs, of the differences within "
        "a round.",
    )
    page.head(COLUMNS)
    page.rows(row(name, options.repeats) for name in options.networks)
    if options.write:
        page.write(RESULTS / "regularizer-cpu.md")


def row(name: str, repeats: int) -> list[str]:
    channels, side = CASES[name]
    model = NETWORKS[name](channels, 10, 1.0)
    images, labels = torch.randn(BATCH, channels, side, side), torch.randint(10, (BATCH,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    terms = [None, *(ci.ConvolutionalSimilarity(model, normalized=normalized) for normalized in (False, True))]

    def step(term: ci.ConvolutionalSimilarity | None) -> float:
        started = time.perf_counter()
        loss = F.cross_entropy(model(images), labels)
        if term is not None:
            loss = loss + 1e-3 * term()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return time.perf_counter() - started

    times: list[list[float]] = [[], [], []]
    for _ in range(max(3, repeats // 10) if name == "cifar_resnet18" else repeats):
        for column, term in zip(times, terms, strict=True):
            column.append(step(term))
    without = statistics.median(times[0])
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 4)
    cells = [name, f"{channels}×{side}×{side}", f"{weights / 1e6:.2f} M", f"{1e3 * without:.1f} ms"]
    for column in times[1:]:
        more = statistics.median(seconds - base for seconds, base in zip(column, times[0], strict=True))
        cells += [f"{1e3 * (without + more):.1f} ms", f"{more / without:+.1%}"]
    return cells


if __name__ == "__main__":
    main()
