"""Pictures of a run, a model, or several side by side. matplotlib is imported when one is drawn, torch too."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from convsim_init.errors import InputError
from convsim_init.files import check_target, replacing

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


def check_plot(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """The path, if a picture can be drawn and written there.

    Raises:
        InputError: If matplotlib is not installed, or the path cannot be written.
    """
    target = check_target(path, overwrite=overwrite, suffixes=SUFFIXES)
    if find_spec("matplotlib") is None:
        raise InputError("expected matplotlib to draw with, got none: pip install 'convsim-init[plot]'")
    return target


def figure_of_run(report: Report, before: Snapshot, after: Snapshot, *, layer: str | None = None) -> Figure:
    """Draw what a run did: similarity of every layer, feature-map correlation of one, first filters, and the losses.

    Args:
        report: Of the run.
        before: The model before it.
        after: The model after it.
        layer: Whose feature-map correlations are shown. Default: the most changed layer.

    Raises:
        InputError: If matplotlib is not installed, nothing was measured, or there is no such layer.
    """
    losses = {layer.name: layer.losses for layer in report.layers if layer.after}
    return figure_of([before, after], title=_title_of_run(report), losses=losses, layer=layer)


def figure_of(
    snapshots: Sequence[Snapshot],
    *,
    title: str,
    losses: Mapping[str, Sequence[float]] | None = None,
    layer: str | None = None,
) -> Figure:
    """Draw one model or checkpoint, or several side by side.

    Args:
        snapshots: What to draw, at least one.
        title: Of the whole picture.
        losses: For each layer the loss at the start and after each step.
        layer: Whose feature-map correlations are shown. Default: the layer that differs most or, of a single model,
            the one whose feature maps are most correlated.

    Raises:
        InputError: If matplotlib is not installed, nothing was measured, or there is no such layer.
    """
    chosen = choose_layer(snapshots, layer)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(f"expected matplotlib to draw with, got {error}: pip install 'convsim-init[plot]'") from error
    from convsim_init.plotting import panels

    with panels.style():
        label_inches = panels.label_inches(snapshots)
        many = len(snapshots) > panels.ABREAST
        lower = panels.SQUARE * (2 if many else 1)
        titles = textwrap.wrap(title, 130) or [""]
        figure = Figure(
            figsize=(panels.WIDTH, 3.2 + label_inches + lower + 0.25 * len(titles)),
            layout="constrained",
            dpi=DOTS_PER_INCH,
        )
        figure.suptitle(panels.plain("\n".join(titles)), x=0.01, ha="left", weight="bold")
        above, below = figure.subfigures(2, 1, height_ratios=[3.2 + label_inches, lower], squeeze=False).flatten()
        panels.draw_similarity(above, snapshots)
        shown = {key: values for key, values in (losses or {}).items() if len(values) > 1 and values[0] > 0}
        shares = [float(len(snapshots))] * 2 + [1.3] * bool(shown)
        if many:
            grid = below.subfigures(2, 1, squeeze=False)
        else:
            grid = below.subfigures(1, len(shares), width_ratios=shares, squeeze=False)
        places = grid.flatten()
        panels.draw_correlations(places[0], snapshots, chosen)
        panels.draw_filters(places[1], snapshots)
        if shown and not many:
            panels.draw_losses(places[2], shown)
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
            some = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise InputError(f"expected a layer to draw, got {layer!r}: there are {some}")
        return layer

    def span(name: str) -> float:
        values = [one[name].get(CORRELATION, one[name][SIMILARITY]) for one in measures]
        return max(values) - (min(values) if len(values) > 1 else 0)

    return max(names, key=span)


def save_figure(figure: Figure, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write a figure as PNG, SVG or PDF, whole or not at all; the same figure gives the same bytes.

    Args:
        figure: What to write.
        path: Ends in ``.png``, ``.svg`` or ``.pdf``.
        overwrite: Replace an existing file.

    Returns:
        The path given.

    Raises:
        InputError: If the path cannot be written.
        RunError: If writing fails; a file that was there is still there.
    """
    from convsim_init.plotting import panels

    target = check_target(path, overwrite=overwrite, suffixes=SUFFIXES)
    with replacing(target, overwrite=overwrite) as temporary, panels.style():
        figure.savefig(
            temporary, format=target.suffix[1:], dpi=DOTS_PER_INCH, metadata=NO_DATE[target.suffix], facecolor="white"
        )
    return target


def _settle(figure: Figure) -> None:
    """Lay out the figure once and round the places: the last bits of what the solver finds change from run to run."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        x, y, width, height = (round(share, 5) for share in axes.get_position(original=True).bounds)
        axes.set_position((x, y, width, height))


def _title_of_run(report: Report) -> str:
    before, after = report.totals["before"], report.totals["after"]
    name = report.model or "model"
    if not after:
        return name
    old, new = before[SIMILARITY], after[SIMILARITY]
    share = f" ({new / old:.1%})" if old else ""
    return f"{name}: mean normalized similarity {old:.2e} → {new:.2e}{share}"
