"""What a ConvNet of a billion weights would take on 1, 8 and 64 GPUs: counted and computed, not measured.

    python -m benchmarks.speed.scale_model

What a step moves, computes, launches and holds is counted while a small layer is lowered here, on the CPU: every
operation reads its arguments from memory and writes its results to it, as on a GPU whose cache is smaller than the
layer. The rest are the assumptions printed below.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from convsim_init.optim.descent import descend
from convsim_init.parallel.partition import OVERHEAD, deal
from convsim_init.settings import SWITCH, Settings

FILTERS, CHANNELS = 64, 64  # of the layer that is counted: one block on the CPU, as any layer is on a GPU
FEW, MANY = 5, 15  # steps; the difference leaves out what is done once
GPUS = (1, 8, 64)
PER_MACHINE = 8

STEPS = 35  # most that a 3x3 layer of a ResNet took
BANDWIDTH = 4.3e12  # bytes/s of a copy in an H200's memory, of 4.8e12 on paper
MEMORY = 139 * 2**30
LAUNCH = 5e-6  # s an operation takes at least
HOST, NETWORK = 50e9, 40e9  # bytes/s between a GPU and its host's memory, and between machines, for each GPU
DRAWING, WRITING = 50e6, 1e9  # weights/s drawn by one process; bytes/s to disk


def network() -> list[tuple[int, int, int, int]]:
    """Shapes of the 3x3 layers of a plain ResNet with four stages."""
    shapes, before = [(256, 3, 3, 3)], 256
    for width, layers in ((256, 8), (512, 16), (1024, 40), (2048, 15)):
        shapes += [(width, before if first else width, 3, 3) for first in [width != before] + [False] * layers]
        before = width
    return shapes


@dataclass(frozen=True)
class Step:
    """What one step takes: bytes moved, operations of arithmetic and bytes held for each weight; and launches."""

    moved: float
    flop: float
    held: float
    launches: float


class Count(TorchDispatchMode):
    """Counts operations, the bytes they read and write, and the most that was held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = self.launches = self.held = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = tensors(args, kwargs), tensors(result)
        if func.is_view or not made:
            return result
        self.launches += 1
        # What is given as `out` is not read.
        read = [one for one in given if not any(one is other for other in tensors((kwargs or {}).get("out")))]
        self.moved += sum(one.numel() * one.element_size() for one in [*read, *made])
        for one in made:
            storage = one.untyped_storage()
            self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: value for key, value in self._alive.items() if not value[0].expired()}
        self.held = max(self.held, sum(size for _, size in self._alive.values()))
        return result


def tensors(*trees: Any) -> list[Tensor]:
    """Each tensor there, once."""
    return list({id(leaf): leaf for tree in trees for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}.values())


def counted_step() -> Step:
    """Counted between a short and a long descent."""
    bank = torch.randn(1, FILTERS, CHANNELS, 3, 3, generator=torch.Generator().manual_seed(0))
    counts = []
    for steps in (FEW, MANY):
        with Count() as count:
            descend(bank, Settings(steps=steps, tolerance=0))
        with FlopCounterMode(display=False) as flops:
            descend(bank, Settings(steps=steps, tolerance=0))
        # Products of matrices, and one operation for each value that anything writes or reads besides.
        counts.append((count.moved, flops.get_total_flops() + count.moved / 8, count.launches, count.held))
    (moved, flop, launches, _), (more_moved, more_flop, more_launches, held) = counts
    weights, steps = bank.numel(), MANY - FEW
    return Step(
        moved=(more_moved - moved) / steps / weights,
        flop=(more_flop - flop) / steps / weights,
        held=(held + bank.nbytes) / weights,
        launches=(more_launches - launches) / steps,
    )


def rows(step: Step, sizes: list[int]) -> Iterator[list[str]]:
    """A row for each number of GPUs."""
    total = sum(sizes)
    for gpus in GPUS:
        owners = deal([OVERHEAD + size for size in sizes], gpus)
        loads = [[size for size, owner in zip(sizes, owners, strict=True) if owner == gpu] for gpu in range(gpus)]
        lowering = max(STEPS * sum(seconds(step, size) for size in load) for load in loads)
        alone = STEPS * sum(seconds(step, size) for size in sizes)
        link = HOST if gpus <= PER_MACHINE else NETWORK
        yield [
            str(gpus),
            f"{total / gpus / 1e6:.1f} M",
            f"{max(map(sum, loads)) / 1e6:.1f} M",
            f"{lowering:.2f} s",
            f"{alone / lowering:.1f}",
            f"{max(sizes) * step.held / 2**30:.1f} GiB",
            f"{4 * total / link:.2f} s",
            f"{total / DRAWING + 4 * total / WRITING:.0f} s",
        ]


def seconds(step: Step, size: int) -> float:
    """Of one step of a layer."""
    return max(size * step.moved / BANDWIDTH, step.launches * LAUNCH)


def main() -> None:
    os.environ[SWITCH] = "0"  # torch's operations, as on a GPU
    step, shapes = counted_step(), network()
    sizes = [torch.Size(shape).numel() for shape in shapes]
    few = step.launches * LAUNCH * BANDWIDTH / step.moved
    lines = [
        f"A step moves {step.moved:.0f} bytes and computes {step.flop:.0f} operations for each weight of a 3x3 layer,",
        f"{step.flop / step.moved:.2f} a byte, and needs {step.held:.0f} bytes of memory for each. It launches "
        f"{step.launches:.0f} operations,",
        f"which takes longer than moving the bytes of a layer of less than {few / 1e6:.1f} M weights.",
        "",
        f"Assumed: {len(sizes)} layers, {sum(sizes) / 1e6:.0f} M weights, the largest layer {max(sizes) / 1e6:.1f} M; "
        f"{STEPS} steps; {BANDWIDTH / 1e12} TB/s in",
        f"memory, {LAUNCH * 1e6:.0f} us a launch, {HOST / 1e9:.0f} GB/s to the host, {NETWORK / 1e9:.0f} GB/s between "
        f"machines of {PER_MACHINE} GPUs; {DRAWING / 1e6:.0f} M weights/s",
        f"drawn by a process, {WRITING / 1e9:.0f} GB/s to disk. A GPU has {MEMORY / 2**30:.0f} GiB.",
        "",
    ]
    print("\n".join(lines))
    print("| GPUs | weights, mean | weights, most | lowering | speed-up | memory | exchange | drawing and writing |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows(step, sizes):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
