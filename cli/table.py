"""A report as a table for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from convsim_init.report import LayerReport, Report

OUTCOMES = ("initialized", "approximated", "planned", "skipped", "failed")
HEADER = ["layer", "shape", "similarity before -> after", "", "norm ratio", ""]
UNTREATED_HEADER = ["layer", "shape", "outcome", "", "", ""]


def format_report(report: Report) -> str:
    """One line a convolution, then the totals. Similarity is the normalized one: blind to scale."""
    header = HEADER if any(layer.after for layer in report.layers) else UNTREATED_HEADER
    rows = [header, *map(_row, report.layers)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    used = [column for column, width in enumerate(widths) if width]
    lines = ["  ".join(row[column].ljust(widths[column]) for column in used).rstrip() for row in rows]
    return "\n".join([*lines, "", *_totals(report)])


def _row(layer: LayerReport) -> list[str]:
    shape = "x".join(map(str, layer.shape))
    if not layer.after:
        return [layer.name, shape, layer.outcome.value, "", "", layer.reason or ""]
    change, share = _change(layer.before, layer.after)
    return [layer.name, shape, change, share, f"{layer.after['norm_ratio']:.6f}", layer.reason or ""]


def _totals(report: Report) -> list[str]:
    totals = report.totals
    before, after = totals["before"], totals["after"]
    counts = [f"{totals[name]} {name}" for name in OUTCOMES if name in totals]
    lines = [f"{report.model}, {totals['layers']} convolutions: {', '.join(counts)}"]
    if after:
        change, share = _change(before, after)
        lines.append(f"mean normalized similarity {change} ({share.strip()}), norm ratio {after['norm_ratio']:.6f}")
        lines.append(f"sum of raw similarity {before['similarity']:.4g} -> {after['similarity']:.4g}")
    if report.file is None or report.file_bytes is None:
        file = "nothing written"
    else:
        file = f"{click.format_filename(report.file)} ({report.file_bytes / 1e6:.1f} MB)"
    return [*lines, f"{report.seconds:.2f} s, {file}"]


def _change(before: dict[str, float], after: dict[str, float]) -> tuple[str, str]:
    old, new = before["normalized_similarity"], after["normalized_similarity"]
    return f"{old:.3e} -> {new:.3e}", f"{new / old:6.1%}" if old else ""
