"""Pictures of a run, a model, or several side by side. matplotlib is imported when one is drawn, torch too."""

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
WIDTH = 10.0  # inches, as are the heights of a row of panels, of the layers and of a line of the title
PANELS, LAYERS, LINE = 3.0, 2.9, 0.25
ABREAST = 2  # snapshots whose correlations and filters fit into one row


def check_plot(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """The path, if a picture can be drawn and written there; an `InputError` if not, or where matplotlib is missing."""
    target = check_target(path, overwrite=overwrite, suffixes=SUFFIXES)
    if find_spec("matplotlib") is None:
        raise InputError("expected matplotlib to draw with, got none: pip install 'convsim-init[plot]'")
    return target


def is_dark(path: Path) -> bool:
    """Whether a picture's file asks for a dark background: ``resnet18-dark.png`` does."""
    return path.stem.endswith("-dark")


def figure_of_run(
    report: Report, before: Snapshot, after: Snapshot, *, layer: str | None = None, dark: bool = False
) -> Figure:
    """Draw what a run did, as `figure_of` does, to the snapshots of a model before and after it."""
    treated = [layer for layer in report.layers if layer.after]
    losses = {layer.name: layer.losses for layer in treated}
    left = [layer.after[SIMILARITY] / layer.before[SIMILARITY] for layer in treated if layer.before[SIMILARITY]]
    title = report.model or "model"
    if left:  # the mean over layers is that of a single 7×7 stem
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
    """Draw one model or checkpoint, or several side by side: one row of panels with `choose_layer`'s and first filters.

    Below are the similarity of every layer, and the losses, of each layer at the start and after each step.

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
    """The layer of that name or, without one, the one that differs most between the snapshots.

    Of a single snapshot, the one whose feature maps are most correlated.

    Raises:
        InputError: If there is no such layer, or none at all, with measures in every snapshot.
    """
    measures = [{one.name: one.before for one in snapshot.report.layers} for snapshot in snapshots]
    names = [name for name in snapshots[0].banks if all(name in snapshot.banks for snapshot in snapshots)]
    if not names:
        raise InputError("expected a layer to draw that was measured in all of them, got none: compare like with like")
    if layer is not None:
        if layer not in names:
            raise InputError(f"expected a layer to draw, got {quoted(layer)}: {alternatives(layer, names)}")
        return layer

    def span(name: str) -> float:
        values = [one[name][CORRELATION] for one in measures]
        return max(values) - (min(values) if len(values) > 1 else 0)

    return max(names, key=span)


def save_figure(figure: Figure, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write a figure as PNG, SVG or PDF, as its path ends; equal ones give equal bytes. Fails as `write_text` does."""
    from convsim_init.plotting import panels

    target = check_target(path, overwrite=overwrite, suffixes=SUFFIXES)
    # Part of the style, svg.hashsalt and pdf.fonttype, is read only as the figure is written.
    with replacing(target, overwrite=overwrite) as temporary, panels.style():
        figure.savefig(temporary, format=target.suffix[1:], dpi=DOTS_PER_INCH, metadata=NO_DATE[target.suffix])
    return target


def _settle(figure: Figure) -> None:
    """Lay out the figure once and round the places: the last bits of what the solver finds change from run to run."""
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
