"""What a GPU makes of the descent and of the regularizer: first that it is right, then how fast.

    python setup.py build_ext --inplace     # the compiled step, which the CPU is timed by
    PYTHONPATH=. python -m benchmarks.speed.gpu --out benchmarks/results    # a few minutes

Each time is one of the host, to the end of the GPU's work; the CPU's are of the same machine. With
``--out`` the table goes to that folder, to a file named for the card, row by row. If a result is
wrong nothing is timed. If a part fails the others are run, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

import convsim_init as ci
from benchmarks.machine import cpu_name, file_name
from benchmarks.page import Page
from benchmarks.speed import peers, scale_model
from benchmarks.speed.descents import time_step
from benchmarks.speed.roofline import step_bytes
from benchmarks.speed.shapes import Shape, draw, text
from convsim_init.backends import compiled
from convsim_init.backends.block import cut_into_blocks
from convsim_init.backends.gpu import MAX_TAPS
from convsim_init.backends.gradient import Layout, summed_similarity
from convsim_init.backends.torch_ops import TorchBlock
from convsim_init.functional.bank import filter_bank
from convsim_init.functional.fourier import Fourier
from convsim_init.optim.descent import descend
from convsim_init.settings import Settings

Row = tuple[str, str, str, str]  # what, value, compared with, goal
DEVICE = "cuda"
SMALL = [(130, 20, 3, 3), (256, 600, 1, 1), (64, 33, 2, 2), (20, 9, 5), (12, 8, 2, 2, 2), (64, 3, 7, 7)]
LARGE, HUGE = (512, 512, 3, 3), (2048, 2048, 3, 3)
BATCH, SIDE = 128, 224
COPIED = 2**32  # bytes
REPEATS = 5
FAILED = "failed"
FIRST = """
import time
import convsim_init as ci
network = ci.build_model("resnet50", seed=0)
started = time.perf_counter()
ci.initialize_(network, device="cuda")
print(time.perf_counter() - started)
"""
TOLERANCE = 5e-6  # of a sum or a vector, against float64
IN_FLOAT32 = 2e-5  # of the regularizer: torch's operations add up the 49 taps of 7x7 kernels in float32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the table there")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            f"expected a CUDA device and a PyTorch built for it, got PyTorch {torch.__version__} without: no result"
        )
    if compiled.library() is None:
        sys.exit(
            f"expected the compiled step, which the CPU is timed by, got a step {compiled.describe()}: "
            "build it with python setup.py build_ext --inplace, or copy convsim_init/backends/_step.so here"
        )
    card = torch.cuda.get_device_name()
    page = Page(f"Speed on {card}", "Made by `python -m benchmarks.speed.gpu`.", cpu=cpu_name())
    page.head(["what", "result", "compared with", "goal"])
    failed = False
    for part in (correctness_rows, step_rows, network_rows, billion_rows, regularizer_rows, graph_rows):
        for row in rows_or_failure(part):
            failed |= row[1] == FAILED
            page.rows([row])
            if options.out is not None:
                page.write(options.out / f"gpu-{file_name(card)}.md")
    sys.exit(int(failed))


def rows_or_failure(part: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """The rows of a part; if it fails one that says how."""
    try:
        yield from part()
    except Exception as error:  # of any kind: the time on a machine with a GPU is short
        traceback.print_exc()
        yield part.__name__, FAILED, " ".join(f"{type(error).__name__}: {error}".split()), ""
    finally:
        torch.cuda.empty_cache()


def correctness_rows() -> Iterator[Row]:
    """Both passes of a step, then the whole descent, against the CPU in float64.

    Raises:
        SystemExit: If a result is wrong.
    """
    for shape in SMALL:
        kind, error = worst_error(shape)
        if DEVICE == "cuda" and math.prod(shape[2:]) <= MAX_TAPS and kind != "FusedBlock":
            sys.exit(f"{text(shape)}: expected the fused kernels, got {kind}: has it Triton and a C compiler?")
        exact, found = (
            descend(filter_bank(weight), Settings()) for weight in (draw(shape).double(), draw(shape).to(DEVICE))
        )
        apart = abs(found.losses[-1] - exact.losses[-1]) / exact.losses[0]
        what = f"{text(shape)} by {kind}: largest error of a step"
        yield what, f"{error:.1e}", "the CPU in float64", f"≤ {TOLERANCE:.0e}"
        steps = f"{found.steps} steps, the loss ends {apart:.1e} of the start apart"
        yield f"{text(shape)}: whole descent", steps, f"{exact.steps} steps", "≤ 1e-3"
        off = regularizer_error(shape)
        what = f"{text(shape)}: largest error of the regularizer and its gradient"
        yield what, f"{off:.1e}", "the CPU in float64", f"≤ {IN_FLOAT32:.0e}"
        if not (error <= TOLERANCE and off <= IN_FLOAT32 and apart <= 1e-3):
            sys.exit(f"{text(shape)}: a wrong result, so nothing is timed")


def worst_error(shape: Shape) -> tuple[str, float]:
    """The backend that is chosen for the shape, and its largest relative error in two steps."""
    bank, cpu = filter_bank(draw(shape)).double(), torch.device("cpu")
    scale = bank.flatten(2).norm(dim=-1)
    fourier = Fourier(bank.shape[3:], torch.float64, cpu)
    (cut,) = fourier.blocks(bank, scale, bank.numel())
    exact = TorchBlock(*cut, fourier, Settings(), threading.local())
    card = bank.to(DEVICE, torch.float32)
    (block,) = cut_into_blocks(card, scale.to(DEVICE), Fourier(bank.shape[3:], card.dtype, card.device), Settings())
    errors, length = list[float](), 1.0
    for _ in range(2):
        keep, add, shift, factor, bend = torch.rand(5, bank.shape[0], 1, bank.shape[1], dtype=torch.float64) + 0.5
        wanted, found = (
            each.evaluate(*(value.to(like) for value in (keep, add / length, shift)))[0]
            for each, like in ((exact, bank), (block, card))
        )
        errors += [relative(part, sums) for part, sums in zip(found, wanted, strict=True) if sums.any()]
        length = float(wanted[1].sum()) ** 0.5
        wanted, found = (
            each.turn(0.3, factor.to(like) / 8, -bend.to(like)).flatten()[[1, 2, 4, 5, 8]]
            for each, like in ((exact, bank), (block, card))
        )
        errors += [relative(found / found.norm(), wanted / wanted.norm()), relative(block.weights, exact.weights)]
    return type(block).__name__, max(errors)


def regularizer_error(shape: Shape) -> float:
    """The largest relative error of the regularizer, raw or normalized, and of its gradient."""
    exact, errors = draw(shape).double().requires_grad_(), list[float]()
    weight = exact.detach().to(DEVICE, torch.float32).requires_grad_()
    for normalized in (False, True):
        wanted = ci.convolutional_similarity(exact, normalized=normalized)
        found = summed_similarity([weight], [Layout()], "all", "matched", normalized=normalized)
        pairs = zip(torch.autograd.grad(found, weight), torch.autograd.grad(wanted, exact), strict=True)
        errors += [relative(found.detach(), wanted.detach()), *(relative(own, other) for own, other in pairs)]
    return max(errors)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.cpu().double() - wanted).norm() / wanted.norm())


def step_rows() -> Iterator[Row]:
    """A step of large layers against a copy, the CPU and the plain port of the published recipe."""
    source = torch.randn(COPIED // 4, device=DEVICE)
    target = torch.empty_like(source)
    copied = 2 * COPIED / min(seconds(partial(target.copy_, source)) for _ in range(REPEATS))
    del source, target
    for shape in (LARGE, HUGE):
        ours = median(time_step(draw(shape).to(DEVICE)) for _ in range(REPEATS))
        rate = step_bytes(shape) / ours
        goal = "≥ 30 %" if shape == HUGE else ""
        what = f"one step on {text(shape)}, {1e3 * ours:.2f} ms"
        yield f"{what}: bytes a second", f"{rate / 1e9:.0f} GB/s", f"{rate / copied:.0%} of a copy", goal
        every = torch.get_num_threads()
        for threads in (every, 2):
            torch.set_num_threads(threads)
            theirs = time_step(draw(shape))
            goal = "≥ 30" if (shape, threads) == (HUGE, 2) else ""
            yield what, f"{theirs / ours:.0f} times as fast", f"{threads} threads of the CPU", goal
        torch.set_num_threads(every)
    ours = time_step(draw(LARGE).to(DEVICE))
    port = peers.time_step(draw(LARGE).to(DEVICE), peers.adjacent_similarity)
    name = f"grouped conv2d, adjacent pairs, autograd, Adam, there: {1e3 * port:.1f} ms"
    yield f"one step on {text(LARGE)}, {1e3 * ours:.2f} ms", f"{port / ours:.0f} times as fast", name, ""


def network_rows() -> Iterator[Row]:
    """Whole networks, from weights on the CPU and on the GPU; measuring before and after counts."""
    for device in (DEVICE, None):
        networks = (ci.build_model("resnet50", seed=seed) for seed in range(4))
        times = [seconds(partial(ci.initialize_, network, device=device)) for network in networks]
        what = f"ResNet-50, weights on the CPU, computed on the {'GPU' if device else 'CPU'}"
        yield what, f"{min(times[1:]):.2f} s", f"{times[0]:.2f} s the first of four", "≤ 0.5 s" if device else ""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"TRITON_CACHE_DIR": folder}
        done = subprocess.run(
            [sys.executable, "-c", FIRST], env=environment, capture_output=True, text=True, check=True
        )
    yield (
        "the same on the GPU, as a process's first",
        f"{float(done.stdout):.2f} s",
        "kernels compiled, CUDA started",
        "",
    )


def billion_rows() -> Iterator[Row]:
    """A network of a billion weights that are on the GPU."""
    torch.cuda.reset_peak_memory_stats()
    weights = {
        f"{index}.weight": torch.nn.init.kaiming_normal_(torch.empty(shape, device=DEVICE))
        for index, shape in enumerate(scale_model.network())
    }
    took = seconds(partial(ci.initialize_, weights, device=DEVICE))
    peak = torch.cuda.max_memory_allocated() / 2**30
    yield "a billion weights on the GPU", f"{took:.1f} s", f"{peak:.1f} GiB at most", ""


def regularizer_rows() -> Iterator[Row]:
    """What the regularizer adds to a training step of ResNet-50."""
    model = ci.build_model("resnet50").to(DEVICE).to(memory_format=torch.channels_last)
    images, labels = torch.randn(BATCH, 3, SIDE, SIDE, device=DEVICE), torch.randint(1000, (BATCH,), device=DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step(term: Callable[[], torch.Tensor] | None) -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        (loss if term is None else loss + 1e-3 * term()).backward()
        optimizer.step()

    for normalized in (False, True):
        term = ci.ConvolutionalSimilarity(model, normalized=normalized)
        rounds = [[seconds(partial(step, each)) for each in (None, term)] for _ in range(4 * REPEATS)]
        without = median(first for first, _ in rounds[REPEATS:])
        more = median(second - first for first, second in rounds[REPEATS:])
        what = f"regularizer, {'normalized' if normalized else 'raw'}, batch {BATCH}, bfloat16: {1e3 * more:.2f} ms"
        yield what, f"{more / without:+.1%}", f"a step without, {1e3 * without:.1f} ms", "≤ 3 %"


def graph_rows() -> Iterator[Row]:
    """The regularizer of ResNet-50 and its gradient in a CUDA graph."""
    model = ci.build_model("resnet50").to(DEVICE)
    for normalized in (False, True):
        term = ci.ConvolutionalSimilarity(model, normalized=normalized)

        def gradients(term: Callable[[], torch.Tensor] = term) -> tuple[torch.Tensor | None, ...]:
            return torch.autograd.grad(term(), list(model.parameters()), allow_unused=True)

        for _ in range(REPEATS):
            gradients()
        eager = min(seconds(gradients) for _ in range(REPEATS))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            gradients()
        replayed = min(seconds(graph.replay) for _ in range(REPEATS))
        what = f"regularizer, {'normalized' if normalized else 'raw'}, alone, with its gradient, in a CUDA graph"
        yield what, f"{1e3 * replayed:.2f} ms", f"{1e3 * eager:.2f} ms without", ""


def seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
