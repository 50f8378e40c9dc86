"""Pictures of a run, a model, or several side by side. Imports matplotlib and torch only when one is drawn."""

from __future__ import annotations

import os
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from convsim_init.errors import InputError
from convsim_init.files.writing import check_target, replacing
from convsim_init.report.text import alternatives, quoted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from convsim_init.metrics.snapshot import Snapshot
    from convsim_init.report.report import Report

SUFFIXES = (".png", ".svg", ".pdf")
NO_DATE: dict[str, dict[str, str | None]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}
DOTS_PER_INCH = 150
CORRELATION, SIMILARITY = "feature_correlation_natural", "normalized_similarity"
WIDTH = 10.0  # inches
PANELS, LAYERS, LINE = 3.0, 2.9, 0.25  # heights in inches: of a row of panels, of the layers, of a line of the title
ABREAST = 2  # correlations and filters of so many snapshots fit into one row


def check_plot(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """The path, if a picture can be drawn and written there; else, or without matplotlib, an `InputError`."""
    target = check_target(path, overwrite=overwrite, suffixes=SUFFIXES)
    if find_spec("matplotlib") is None:
        raise InputError("expected matplotlib to draw with, got none: pip install 'convsim-init[plot]'")
    return target


def is_dark(path: Path) -> bool:
    """Whether a picture's file name asks for a dark background, as ``resnet18-dark.png`` does."""
    return path.stem.endswith("-dark")


def figure_of_run(
    report: Report, before: Snapshot, after: Snapshot, *, layer: str | None = None, dark: bool = False
) -> Figure:
    """Draw a run by `figure_of`, from the snapshots of a model before and after it."""
    treated = [layer for layer in report.layers if layer.after]
    losses = {layer.name: layer.losses for layer in treated}
    left = [layer.after[SIMILARITY] / layer.before[SIMILARITY] for layer in treated if layer.before[SIMILARITY]]
    title = report.model or "model"
    if left:  # a single 7×7 stem would dominate the mean over layers
        title += f": {statistics.median(left):.1%} of the filters' similarity is left in the median layer"
    return figure_of([before, after], title=title, losses=losses, layer=layer, dark=dark)


def figure_of(
    snapshots: Sequence[Snapshot],
    *,
    title: str,
    losses: Mapping[str, Sequence[float]] | None = None,
    layer: str | None = None,
    dark: bool = False,
) -> Figure:
    """Draw one model or checkpoint, or several side by side.

    Above are panels with the correlations of the layer that `choose_layer` returns and with the first layer's filters.
    Below are the similarity of every layer and the losses, for each layer at the start and after each step.

    Raises:
        InputError: If matplotlib is not installed, nothing was measured, or there is no such layer.
    """
    chosen = choose_layer(snapshots, layer)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(f"expected matplotlib to draw with, got {error}: pip install 'convsim-init[plot]'") from error
    from convsim_init.plotting import panels

    titles = textwrap.wrap(title, 100) or [""]
    rows = 1 if len(snapshots) <= ABREAST else 2
    heights = [rows * PANELS, LAYERS]
    with panels.style(dark=dark):
        size = (WIDTH, sum(heights) + LINE * len(titles))
        figure = Figure(figsize=size, layout="constrained", dpi=DOTS_PER_INCH)
        figure.suptitle(panels.literal("\n".join(titles)), x=0.01, ha="left", weight="bold")
        above, below = figure.subfigures(2, 1, height_ratios=heights, squeeze=False).flat
        shares = [1.15, 1] if rows == 1 else [1]  # correlations have a colour bar
        correlations, filters = above.subfigures(rows, len(shares), width_ratios=shares, squeeze=False).flat
        panels.draw_correlations(correlations, snapshots, chosen)
        panels.draw_filters(filters, snapshots)
        shown = [values for values in (losses or {}).values() if len(values) > 1 and values[0] > 0]
        if shown:
            below, right = below.subfigures(1, 2, width_ratios=[2.6, 1], squeeze=False).flat
            panels.draw_losses(right, shown)
        panels.draw_similarity(below, snapshots)
        _settle(figure)
    return figure


def choose_layer(snapshots: Sequence[Snapshot], layer: str | None = None) -> str:
    """The layer of that name or, without a name, the one that differs most between the snapshots.

    For a single snapshot it is the layer whose feature maps are most correlated.

    Raises:
        InputError: If there is no such layer, or none at all, with measures in every snapshot.
    """
    measures = [{entry.name: entry.before for entry in snapshot.report.layers} for snapshot in snapshots]
    names = [name for name in snapshots[0].banks if all(name in snapshot.banks for snapshot in snapshots)]
    if not names:
        raise InputError("expected a layer to draw that was measured in all of them, got none: compare like with like")
    if layer is not None:
        if layer not in names:
            raise InputError(f"expected a layer to draw, got {quoted(layer)}: {alternatives(layer, names, 'choice')}")
        return layer

    def span(name: str) -> float:
        values = [layers[name][CORRELATION] for layers in measures]
        return max(values) - (min(values) if len(values) > 1 else 0)

    return max(names, key=span)


def save_figure(figure: Figure, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write a figure as PNG, SVG or PDF, by its path's suffix: the same bytes each time. Fails as `write_text` does."""
    from convsim_init.plotting import panels

    target = check_target(path, overwrite=overwrite, suffixes=SUFFIXES)
    # Two settings of the style, svg.hashsalt and pdf.fonttype, are read only when the figure is written.
    with replacing(target, overwrite=overwrite) as temporary, panels.style():
        figure.savefig(temporary, format=target.suffix[1:], dpi=DOTS_PER_INCH, metadata=NO_DATE[target.suffix])
    return target


def _settle(figure: Figure) -> None:
    """Lay out the figure once and round all places: the last bits of the solver's result differ from run to run."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    parts = list(figure.subfigs)
    for part in parts:  # which grows
        place = part.bbox_relative
        place.set_points(place.get_points().round(5))
        parts += part.subfigs
    for axes in figure.axes:
        # The original place: the active one of an image is what its aspect ratio has left of it.
        x, y, width, height = (round(share, 5) for share in axes.get_position(original=True).bounds)
        axes.set_position((x, y, width, height))
