"""The panels of a picture, drawn on matplotlib's figures without its global state."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from convsim_init.metrics.expected import expected_correlation
from convsim_init.report.text import layer_name, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

    from convsim_init.metrics.snapshot import Snapshot

Array = np.ndarray[Any, Any]

MAX_FILTERS, MAX_MAPS = 64, 128  # filters and feature maps shown of a layer
MAX_CHARACTERS = 24  # of a layer's name on the axis, and of a line of a label
INCHES_A_CHARACTER = 0.075
GAP = 9  # a filter is at least so many times as high as the gap below it
DARK = "#0d1117"
OKABE_ITO = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "0.5")
MARKERS = "osD^vP*X<>hp"
FAINT: dict[str, Any] = {"color": "0.5", "alpha": 0.5, "linewidth": 0.8}  # visible on white and on black
STYLE = {
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "figure.titlesize": 11,
    "font.size": 9,
    "grid.alpha": 0.3,
    "grid.color": "0.5",
    "legend.fontsize": 8,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "svg.hashsalt": "convsim-init",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


@contextmanager
def style(*, dark: bool = False) -> Iterator[None]:
    """Context with matplotlib's own defaults and ours, whatever the user's settings are, to draw and to write in."""
    from matplotlib import style as styles

    background: list[Any] = ["dark_background", {"axes.facecolor": DARK, "figure.facecolor": DARK}] if dark else []
    with styles.context(["default", *background, STYLE]):
        yield


def literal(text: str) -> str:
    """The text with its dollars escaped, between which matplotlib would see mathematics."""
    return text.replace("$", r"\$")


def draw_correlations(figure: SubFigure, snapshots: Sequence[Snapshot], name: str) -> None:
    """Expected correlations between the feature maps of one layer, in each snapshot, on one colour scale."""
    matrices = [correlations(snapshot.banks[name]) for snapshot in snapshots]
    bank = snapshots[0].banks[name]
    count = max(math.prod(snapshot.banks[name].shape[:2]) for snapshot in snapshots)
    some = f"first {MAX_MAPS} of {count}" if count > MAX_MAPS else f"{count}"
    title = f"Expected correlation of feature maps: {layer_name(name)}, {some} filters, {_size(bank.shape[3:])}"
    highest = max((float(np.nanmax(matrix)) for matrix in matrices if np.isfinite(matrix).any()), default=1.0)
    panels = _panels(figure, snapshots, title)
    for axes, snapshot, matrix in zip(panels, snapshots, matrices, strict=True):
        image = axes.imshow(matrix, cmap="cividis", vmin=0, vmax=highest or 1.0, interpolation="nearest")
        (layer,) = (layer for layer in snapshot.report.layers if layer.name == name)
        mean = layer.before["feature_correlation_natural"]
        axes.set_title(f"{axes.get_title()}\nmean {mean:.3f}")
    figure.colorbar(image, ax=panels, label="|correlation|, natural images", shrink=0.8, aspect=25)


def draw_filters(figure: SubFigure, snapshots: Sequence[Snapshot]) -> None:
    """Filters of the first layer in each snapshot, on one scale; mid-grey is zero."""
    name = next(name for name in snapshots[0].banks if all(name in snapshot.banks for snapshot in snapshots))
    bank = snapshots[0].banks[name]
    count, channels = math.prod(bank.shape[:2]), bank.shape[2]
    some = f"first {MAX_FILTERS} of {count}" if count > MAX_FILTERS else f"{count}"
    coloured = {1: "one channel", 3: "as RGB"}.get(channels, f"strongest of {channels} channels each")
    title = f"First layer: {layer_name(name)}, {some} filters, {_size(bank.shape[3:])}, {coloured}; grey is zero"
    stacks = [tiles(snapshot.banks[name]) for snapshot in snapshots]
    largest = max(float(np.abs(stack).max()) for stack in stacks) or 1.0
    for axes, stack in zip(_panels(figure, snapshots, title), stacks, strict=True):
        axes.imshow(mosaic(0.5 + 0.5 * stack / largest), interpolation="nearest")


def draw_similarity(figure: SubFigure, snapshots: Sequence[Snapshot]) -> None:
    """Normalized similarity of every layer: colours tell the snapshots apart, markers the kernel sizes."""
    from matplotlib import colormaps

    axes = figure.subplots()
    layers = [(i, layer) for i, snapshot in enumerate(snapshots) for layer in snapshot.report.layers if layer.before]
    names = list(dict.fromkeys(layer.name for _, layer in layers))
    places = {name: place for place, name in enumerate(names)}
    kernels = sorted({tuple(layer.shape[2:]) for _, layer in layers}, key=lambda kernel: (math.prod(kernel), kernel))
    markers = dict(zip(kernels, itertools.cycle(MARKERS), strict=False))
    colours: Sequence[Any] = OKABE_ITO[: len(snapshots)]
    if len(snapshots) > len(OKABE_ITO):
        colours = [colormaps["viridis"](index / (len(snapshots) - 1)) for index in range(len(snapshots))]
    points = defaultdict(list)  # by snapshot and kernel size: place and value of each layer
    spans = defaultdict(list)  # by place: the values
    for index, layer in layers:
        place, value = places[layer.name], layer.before["normalized_similarity"]
        if value > 0:
            points[index, tuple(layer.shape[2:])].append((place, value))
            spans[place].append(value)
    for (index, kernel), places_and_values in points.items():
        # Larger than those of later snapshots, which lie on them.
        size = (36 if len(names) <= 40 else 20) * (1 + 0.7 * (len(snapshots) - 1 - index))
        x, y = zip(*places_and_values, strict=True)
        axes.scatter(x, y, s=size, color=colours[index], marker=markers[kernel], linewidths=0, zorder=3)
    axes.vlines(list(spans), list(map(min, spans.values())), list(map(max, spans.values())), **FAINT)
    zeros = len(layers) - sum(map(len, spans.values()))
    note = f" ({zeros} at zero, not shown)" if zeros else ""
    axes.set_title(f"Similarity of each layer's filters{note}", loc="left")
    axes.set_ylabel("normalized similarity")
    axes.set_yscale("log")
    axes.grid(axis="y")
    axes.set_xlim(-0.7, len(names) - 0.3)
    _name_layers(axes, [shortened(layer_name(name), MAX_CHARACTERS) for name in names], _characters(figure))
    _legend(figure, list(zip((snapshot.label for snapshot in snapshots), colours, strict=True)), markers)


def draw_losses(figure: SubFigure, losses: Sequence[Sequence[float]]) -> None:
    """Loss at each step of each layer and of all together, divided by the loss at the start."""
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots()
    for values in losses:
        each = axes.plot(np.array(values) / values[0], **FAINT)
    longest = max(map(len, losses))
    # A layer that stopped early keeps its last loss in the sum of all.
    padded = [np.pad(np.array(values), (0, longest - len(values)), mode="edge") for values in losses]
    total = axes.plot(np.sum(padded, axis=0) / sum(values[0] for values in losses), color=OKABE_ITO[1], linewidth=2)
    axes.set_title("Loss, over its start", loc="left")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlabel("step")
    axes.grid(axis="y")
    figure.legend([*each, *total], ["each layer", "sum of all"], loc="outside lower center", ncols=2)


def _panels(figure: SubFigure, snapshots: Sequence[Snapshot], title: str) -> list[Axes]:
    """One panel without axes for each snapshot, with its label above it, and a title above all."""
    figure.suptitle(literal(textwrap.fill(title, _characters(figure))), fontsize=9, x=0.02, ha="left")
    panels = figure.subplots(1, len(snapshots), squeeze=False, gridspec_kw={"wspace": 0.05})[0]
    width = max(8, min(MAX_CHARACTERS, _characters(figure) // len(snapshots) - 3))
    for axes, snapshot in zip(panels, snapshots, strict=True):
        axes.set_title(literal(textwrap.fill(snapshot.label, width)))
        axes.set_axis_off()
    return list(panels)


def _name_layers(axes: Axes, names: Sequence[str], characters: int) -> None:
    """Write names along the axis: those of every layer or, where they do not fit, of one in so many."""
    step = math.ceil(len(names) * (max(map(len, names)) + 2) / characters)
    axes.set_xticks(range(0, len(names), step), [literal(name) for name in names[::step]])
    axes.set_xticks(range(len(names)), minor=True)
    axes.set_xlabel("layer, in network order" + (f" (one in {step} is named)" if step > 1 else ""))


def _legend(figure: SubFigure, colours: Sequence[tuple[str, Any]], markers: Mapping[tuple[int, ...], str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    for label, colour in colours:
        handles.append(Patch(color=colour, label=literal(textwrap.fill(label, MAX_CHARACTERS))))
    for kernel, marker in markers.items():
        handles.append(Line2D([], [], color="0.5", marker=marker, linestyle="", label=f"kernel {_size(kernel)}"))
    columns = max(1, _characters(figure) // (MAX_CHARACTERS + 6))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def _characters(figure: SubFigure) -> int:
    return int(figure.bbox.width / figure.dpi / INCHES_A_CHARACTER)


def _size(kernel: Sequence[int]) -> str:
    return "×".join(map(str, kernel)) or "1"


def correlations(bank: torch.Tensor) -> Array:
    """Magnitudes of the expected correlations of feature maps, NaN on the diagonal."""
    matrix = expected_correlation(bank)[:MAX_MAPS, :MAX_MAPS].abs()
    # A map's correlation with itself, which is 1, would set the scale of colours.
    return matrix.fill_diagonal_(math.nan).float().numpy()


def tiles(bank: torch.Tensor) -> Array:
    """Filters as images ``[filters, height, width, 1 or 3]``."""
    filters = bank.flatten(0, 1)[:MAX_FILTERS].float()  # [N, C, *kernel_size]
    while filters.dim() > 4:
        filters = filters[:, :, filters.shape[2] // 2]
    if filters.dim() == 3:
        filters = filters[:, None]  # a kernel of rank 1 is a row for each channel
    if filters.shape[1] != 3:
        strongest = filters.flatten(2).norm(dim=2).argmax(dim=1)
        filters = filters[torch.arange(len(filters), device=filters.device), strongest, None]
    return filters.movedim(1, -1).nan_to_num().numpy()


def mosaic(tiles: Array) -> Array:
    """Images side by side with nothing between, ``[rows, columns, 4]``."""
    finer = max(1, round(GAP / tiles.shape[1]))
    tiles = tiles.repeat(finer, axis=1).repeat(finer, axis=2)
    count, height, width, _ = tiles.shape
    columns = math.ceil(math.sqrt(count * height / width))
    rows = math.ceil(count / columns)
    canvas = np.zeros((rows * (height + 1) - 1, columns * (width + 1) - 1, 4))  # red, green, blue, opacity
    for index, tile in enumerate(tiles):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        canvas[top : top + height, left : left + width, :3] = tile
        canvas[top : top + height, left : left + width, 3] = 1
    return canvas
