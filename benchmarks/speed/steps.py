"""Rows of the speed benchmark about the descent: a step, the way to a target, and how a step grows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from itertools import pairwise
from statistics import median

from benchmarks.machine import in_turn
from benchmarks.speed import descents, peers
from benchmarks.speed.commands import Row
from benchmarks.speed.shapes import NETWORKS, Shape, Shapes, conv_shapes, draw, text

LARGE = (512, 512, 3, 3)
GOALS = {peers.adjacent_similarity: "≥ 20", peers.ocnn_similarity: "≥ 60"}
GROWS = {
    "filters": [(filters, 256, 3, 3) for filters in (256, 512, 1024)],
    "channels": [(256, channels, 3, 3) for channels in (256, 512, 1024)],
    "the kernel": [(256, 256, side, side) for side in (1, 3, 5, 7)],
}
DEPTHS = (4, 8, 16)
DEEP = (128, 128, 3, 3)
MILLISECONDS = 1e3


def step_rows(repeats: int) -> Iterator[Row]:
    """One step of a large layer, then of every layer of each network, against the peers."""
    weight = draw(LARGE)
    theirs = [partial(peers.time_step, weight, similarity) for similarity in peers.PEERS.values()]
    goals = [GOALS.get(similarity, "") for similarity in peers.PEERS.values()]
    ours = partial(descents.time_step, weight)
    yield from against_peers(f"one step on {text(LARGE)}, all pairs", [ours, *theirs], repeats, goals)
    for network in NETWORKS:
        shapes = conv_shapes(network)
        theirs = [partial(time_peer_step, shapes, similarity) for similarity in peers.PEERS.values()]
        what = f"one step on the {shapes.total()} layers of {network}, all pairs"
        yield from against_peers(what, [partial(descents.time_network_step, shapes), *theirs], repeats, [""] * 3)


def against_peers(what: str, parts: Sequence, repeats: int, goals: Sequence[str]) -> Iterator[Row]:
    """A row for each peer; ours is the first part."""
    ours, *theirs = map(median, in_turn(parts, repeats))
    for name, seconds, goal in zip(peers.PEERS, theirs, goals, strict=True):
        peer = f"{name}, autograd, Adam {MILLISECONDS * seconds:.1f} ms"
        yield what, f"{MILLISECONDS * ours:.1f} ms", peer, f"{seconds / ours:.1f} times as fast", goal


def time_peer_step(shapes: Shapes, similarity: peers.Similarity) -> float:
    """Seconds of a peer's step of all layers: of each shape once, times the layers that have it."""
    return sum(count * peers.time_step(draw(shape), similarity) for shape, count in shapes.items())


def target_rows(repeats: int, cap: float) -> Iterator[Row]:
    """The layers of each network that can get there to a tenth of their normalized similarity.

    Of ResNet-18 these are the 3×3 layers. Only against Adam on all pairs: the other peers lower something else,
    adjacent pairs at free norms or the energy after summing over channels, and would get there late or never.
    """
    for network in NETWORKS:
        every = conv_shapes(network)
        steps = {shape: needed for shape in every if (needed := needed_steps(shape)) is not None}
        shapes = Shapes({shape: every[shape] for shape in steps})
        kernels = ", ".join(sorted({text(shape[2:]) for shape in steps}))
        what = f"{network} to 10 % of its normalized similarity: {shapes.total()} of {every.total()} layers get there"
        if not steps:
            yield what, "", "", "", ""
            continue
        ours = median(*in_turn([partial(descents.time_to_target, shapes, steps)], repeats))
        theirs, reached = time_peer_to_target(shapes, cap)
        bound = "" if reached else "more than "
        peer = f"rFFT, all pairs, autograd, Adam({peers.RATE}), norms restored {bound}{theirs:.0f} s"
        goal = "≥ 80" if network == "ResNet-18" else ""
        yield f"{what} ({kernels})", f"{ours:.2f} s", peer, f"{bound}{theirs / ours:.0f} times as fast", goal


@cache
def needed_steps(shape: Shape) -> int | None:
    return descents.steps_to_target(draw(shape))


@cache
def peer_to_target(shape: Shape, cap: float) -> tuple[float, bool]:
    return peers.time_to_target(draw(shape), cap)


def time_peer_to_target(shapes: Shapes, cap: float) -> tuple[float, bool]:
    """Seconds of the peer, each shape measured once and counted for every layer; and whether all got there."""
    seconds = sum(count * peer_to_target(shape, cap)[0] for shape, count in shapes.items())
    return seconds, all(peer_to_target(shape, cap)[1] for shape in shapes)


def scaling_rows(repeats: int) -> Iterator[Row]:
    """How a step grows with the number of filters and of channels, the size of kernels, and the depth."""
    for what, shapes in GROWS.items():
        times = in_turn([partial(descents.time_step, draw(shape)) for shape in shapes], repeats)
        goal = "" if what == "the kernel" else "≤ 2.3"
        yield from growth(what, list(map(text, shapes)), list(map(median, times)), goal)
    deep = [Shapes({DEEP: depth}) for depth in DEPTHS]
    times = in_turn([partial(descents.time_network_step, shapes) for shapes in deep], repeats)
    names = [f"{depth} layers of {text(DEEP)}" for depth in DEPTHS]
    yield from growth("depth", names, list(map(median, times)), "≤ 2.3")


def growth(what: str, names: Sequence[str], times: Sequence[float], goal: str) -> Iterator[Row]:
    """A row for each step from one size to the next."""
    for (small, large), (before, after) in zip(pairwise(names), pairwise(times), strict=True):
        peer = f"on {small} {MILLISECONDS * before:.1f} ms"
        yield f"{what}: one step on {large}", f"{MILLISECONDS * after:.1f} ms", peer, f"{after / before:.2f}", goal
