"""The panels of a picture, drawn on matplotlib's figures without its global state."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from convsim_init.metrics.expected import expected_correlation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

    from convsim_init.metrics.snapshot import Snapshot

Array = np.ndarray[Any, Any]

WIDTH, SQUARE = 13.0, 3.3  # inches
ABREAST = 3  # snapshots whose lower panels fit into one row
MOST_LABELS = 60  # of layers along the axis
MOST_FILTERS, MOST_MAPS = 64, 128  # shown of a layer
INCHES_A_CHARACTER = 0.075
GAP = 9  # how many times as high as the gap below it a filter is, at least
OKABE_ITO = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
MARKERS = "osD^vP*X<>hp"
STYLE = {
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "figure.titlesize": 11,
    "font.size": 9,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "svg.hashsalt": "convsim-init",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's own defaults and ours, whatever the user's are, for drawing and for writing."""
    from matplotlib import style as styles

    with styles.context(["default", STYLE]):
        yield


def plain(text: str) -> str:
    """Text that matplotlib takes for no mathematics: a dollar in a layer's or a file's name is a dollar."""
    return text.replace("$", r"\$")


def label_inches(snapshots: Sequence[Snapshot]) -> float:
    """Room that the names of the layers need below their axis."""
    names = _names(snapshots)
    return 0.2 if _horizontal(names) else INCHES_A_CHARACTER * max(len(_shown(name)) for name in names)


def draw_similarity(figure: SubFigure, snapshots: Sequence[Snapshot]) -> None:
    """Normalized similarity of every layer: colours tell the snapshots apart, markers the kernel sizes."""
    axes = figure.subplots()
    names = _names(snapshots)
    place = {name: index for index, name in enumerate(names)}
    sizes = _kernel_sizes(snapshots)
    zeros = 0
    low, high = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    scale = 36 if len(names) <= 40 else 20
    for index, (snapshot, colour) in enumerate(zip(snapshots, _colours(len(snapshots)), strict=True)):
        larger = 1 + 0.7 * (len(snapshots) - 1 - index)  # so that those below are seen where values agree
        for size, marker in zip(sizes, _markers(len(sizes)), strict=True):
            points = [
                (place[layer.name], layer.before["normalized_similarity"])
                for layer in snapshot.report.layers
                if layer.before and _size(layer.shape) == size
            ]
            positive = [point for point in points if point[1] > 0]
            zeros += len(points) - len(positive)
            for x, y in positive:
                low[x], high[x] = min(low[x], y), max(high[x], y)
            axes.scatter(
                [x for x, _ in positive],
                [y for _, y in positive],
                s=scale * larger,
                color=colour,
                marker=marker,
                linewidths=0,
                zorder=3,
            )
    several = np.flatnonzero(high > low)
    axes.vlines(several, low[several], high[several], color="0.75", linewidth=1, zorder=1)
    axes.set_yscale("log")
    axes.set_ylabel("normalized similarity (log scale)")
    note = f" ({zeros} at zero, not shown)" if zeros else ""
    axes.set_title(f"How similar the filters of each layer are, in network order{note}", loc="left")
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_xlim(-0.7, len(names) - 0.3)
    step = math.ceil(len(names) / MOST_LABELS)
    shown = range(0, len(names), step)
    rotation = 0 if _horizontal(names) else 90
    axes.set_xticks(shown, [plain(_shown(names[index])) for index in shown], rotation=rotation)
    if step > 1:
        axes.set_xticks(range(len(names)), minor=True)
        axes.set_xlabel(f"layer (every {_ordinal(step)} is named)")
    _legend(figure, axes, snapshots, sizes)


def draw_correlations(figure: SubFigure, snapshots: Sequence[Snapshot], name: str) -> None:
    """Expected correlations between the feature maps of one layer, in each snapshot, on one colour scale."""
    from matplotlib import colormaps

    matrices = [_correlations(snapshot.banks[name]) for snapshot in snapshots]
    filters = [bank.shape[0] * bank.shape[1] for bank in (snapshot.banks[name] for snapshot in snapshots)]
    some = f", first {MOST_MAPS} of them" if max(filters) > MOST_MAPS else ""
    kernels = _size(snapshots[0].banks[name].shape[1:])
    _title(
        figure,
        f"Feature maps' correlation, expected for natural images, of {_shown(name)}: {filters[0]} filters, "
        f"{kernels}{some}",
    )
    colours = colormaps["cividis"].with_extremes(bad="white")
    highest = max((float(np.nanmax(matrix)) for matrix in matrices if np.isfinite(matrix).any()), default=1.0)
    panels = figure.subplots(1, len(snapshots), squeeze=False, gridspec_kw={"wspace": 0.05})[0]
    for axes, snapshot, matrix in zip(panels, snapshots, matrices, strict=True):
        image = axes.imshow(matrix, cmap=colours, vmin=0, vmax=highest or 1.0, interpolation="nearest")
        mean = next(one for one in snapshot.report.layers if one.name == name).before
        axes.set_title(_panel_title(figure, snapshots, snapshot, f"mean {mean['feature_correlation_natural']:.3f}"))
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        axes.set_xlabel("filter")
    panels[0].set_ylabel("filter")
    figure.colorbar(image, ax=list(panels), label="|correlation|", shrink=0.8, aspect=25)


def draw_filters(figure: SubFigure, snapshots: Sequence[Snapshot]) -> None:
    """Filters of the first layer in each snapshot, on one scale; mid-grey is zero."""
    name = next(name for name in snapshots[0].banks if all(name in snapshot.banks for snapshot in snapshots))
    stacks = [_tiles(snapshot.banks[name]) for snapshot in snapshots]
    largest = max(float(np.abs(stack).max()) for stack in stacks) or 1.0
    bank = snapshots[0].banks[name]
    count, channels = bank.shape[0] * bank.shape[1], bank.shape[2]
    some = f"first {MOST_FILTERS} of {count}" if count > MOST_FILTERS else f"{count}"
    coloured = "as RGB" if stacks[0].shape[-1] == 3 else f"first of {channels} channels"
    what = f"{some} filters, {_size(bank.shape[1:])}, {coloured if channels > 1 else 'one channel'}; grey is zero"
    _title(figure, f"First layer, {_shown(name)}: {what}")
    panels = figure.subplots(1, len(snapshots), squeeze=False, gridspec_kw={"wspace": 0.05})[0]
    for axes, snapshot, stack in zip(panels, snapshots, stacks, strict=True):
        axes.imshow(_mosaic(0.5 + 0.5 * stack / largest), interpolation="nearest")
        axes.set_title(_panel_title(figure, snapshots, snapshot))
        axes.set_axis_off()


def draw_losses(figure: SubFigure, losses: Mapping[str, Sequence[float]]) -> None:
    """Loss per step of each layer and of all together, over its start."""
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots()
    for values in losses.values():
        axes.plot(np.array(values) / values[0], color="0.7", linewidth=0.8)
    longest = max(map(len, losses.values()))
    held = [np.pad(np.array(values), (0, longest - len(values)), mode="edge") for values in losses.values()]
    total = np.sum(held, axis=0)
    axes.plot(total / total[0], color=OKABE_ITO[1], linewidth=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel("loss / loss at the start")
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    handles = [axes.plot([], color="0.7", linewidth=0.8, label="each layer")[0]]
    handles += [axes.plot([], color=OKABE_ITO[1], linewidth=2, label="sum of all")[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8)
    _title(figure, "Loss per step")


def _names(snapshots: Sequence[Snapshot]) -> list[str]:
    names = dict.fromkeys(layer.name for snapshot in snapshots for layer in snapshot.report.layers if layer.before)
    return list(names)


def _shown(name: str) -> str:
    return name or "(the model itself)"


def _horizontal(names: Sequence[str]) -> bool:
    return len(names) * (max(len(_shown(name)) for name in names) + 2) * INCHES_A_CHARACTER < WIDTH - 3


def _size(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape[2:])) or "1"


def _kernel_sizes(snapshots: Sequence[Snapshot]) -> list[str]:
    shapes = [layer.shape for snapshot in snapshots for layer in snapshot.report.layers if layer.before]
    ordered = sorted(shapes, key=lambda shape: (math.prod(shape[2:]), shape[2:]))
    return list(dict.fromkeys(map(_size, ordered)))


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    if count <= len(OKABE_ITO):
        return list(OKABE_ITO[:count])
    return [colormaps["viridis"](index / (count - 1)) for index in range(count)]


def _markers(count: int) -> list[str]:
    return [MARKERS[index % len(MARKERS)] for index in range(count)]


def _ordinal(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")


def _legend(figure: SubFigure, axes: Axes, snapshots: Sequence[Snapshot], sizes: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, linewidth=5, solid_capstyle="butt", label=plain(textwrap.fill(snapshot.label, 24)))
        for snapshot, colour in zip(snapshots, _colours(len(snapshots)), strict=True)
    ]
    handles += [
        Line2D([], [], color="0.4", marker=marker, linestyle="", label=f"kernel {size}")
        for size, marker in zip(sizes, _markers(len(sizes)), strict=True)
    ]
    figure.legend(handles=handles, loc="outside right upper")


def _title(figure: SubFigure, text: str) -> None:
    inches = figure.bbox.width / figure.dpi
    figure.suptitle(plain(textwrap.fill(text, int(inches / INCHES_A_CHARACTER))), fontsize=9, x=0.02, ha="left")


def _panel_title(figure: SubFigure, snapshots: Sequence[Snapshot], snapshot: Snapshot, *more: str) -> str:
    inches = figure.bbox.width / figure.dpi / len(snapshots)
    width = max(8, min(24, int(inches / INCHES_A_CHARACTER) - 3))
    return plain("\n".join([*textwrap.wrap(snapshot.label, width), *more]))


def _correlations(bank: torch.Tensor) -> Array:
    """Magnitudes of the expected correlations, without the diagonal."""
    groups = bank.shape[0]
    matrix = expected_correlation(bank.flatten(0, 1), groups=groups)[:MOST_MAPS, :MOST_MAPS].abs()
    return matrix.fill_diagonal_(math.nan).float().numpy()


def _tiles(bank: torch.Tensor) -> Array:
    """Filters as images ``[filters, height, width, 1 or 3]``."""
    filters = bank.flatten(0, 1)[:MOST_FILTERS].float()  # [N, C, *kernel_size]
    while filters.dim() > 4:
        filters = filters[:, :, filters.shape[2] // 2]
    if filters.dim() == 3:
        filters = filters[:, None]  # a kernel of rank 1 is a row for each channel
    shown = filters if filters.shape[1] == 3 else filters[:, :1]
    return shown.movedim(1, -1).nan_to_num().numpy()


def _mosaic(tiles: Array) -> Array:
    """Images side by side with white between, ``[rows, columns, 3]``."""
    finer = max(1, round(GAP / tiles.shape[1]))
    tiles = tiles.repeat(finer, axis=1).repeat(finer, axis=2)
    count, height, width, _ = tiles.shape
    columns = math.ceil(math.sqrt(count * height / width))
    rows = math.ceil(count / columns)
    canvas = np.ones((rows * (height + 1) - 1, columns * (width + 1) - 1, 3))
    for index, tile in enumerate(tiles):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        canvas[top : top + height, left : left + width] = tile
    return canvas
