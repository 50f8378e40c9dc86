"""A report as a table for people, in text and in HTML, from its plain data."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from convsim_init.report.text import PATH, convolutions, layer_name, printable, shown

COLUMNS = {
    "similarity": "normalized_similarity",
    "corr-white": "feature_correlation_white",
    "corr-natural": "feature_correlation_natural",
    "rank-natural": "effective_rank_natural",
}
OUTCOMES = ("initialized", "approximated", "planned", "measured", "skipped", "failed")
CHANGED_HEADER = ["layer", "shape", "similarity before -> after", "", "norm ratio", ""]
MEASURED_HEADER = ["layer", "shape", *COLUMNS, ""]
UNTREATED_HEADER = ["layer", "shape", "outcome", ""]
OPEN_ROWS = 30  # a longer table is folded in HTML
CELL = 200  # characters shown of a cell
OPTIONAL = ("norm ratio", "shape", "corr-white", "rank-natural")  # columns left out on a narrow terminal, in turn
REMARK, NARROWEST = 24, 16  # characters that a narrow terminal keeps for remarks, and for names
FORMULAS = ("=", "+", "-", "@", "\t", "\r")  # spreadsheets compute a text that begins with one of these


@dataclass(frozen=True)
class Table:
    """Rows of text below a header, and lines that sum them up; the last column is for remarks."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    summary: Sequence[str]

    def text(self, width: int | None = None) -> str:
        """Columns two spaces apart, empty ones left out, then the summary.

        Args:
            width: Most characters of a row. Where the rows are longer, the columns of `OPTIONAL` are left out, which
                the summary says, then names and remarks are cut. Default: rows are as long as they are.
        """
        # An empty cell stays empty: `shown` would quote it.
        rows = [[shown(cell, CELL) if cell else "" for cell in row] for row in (self.header, *self.rows)]
        widths = dict(enumerate(max(map(len, column)) for column in zip(*rows, strict=True)))
        columns = [column for column, cells in widths.items() if cells]
        left_out: list[str] = []
        if width is not None:
            last = len(widths) - 1
            widths[last] = min(widths[last], REMARK)
            for name in OPTIONAL:
                if _length(widths, columns) > width and name in self.header:
                    columns.remove(self.header.index(name))
                    left_out.append(name)
            widths[0] = max(NARROWEST, widths[0] - max(0, _length(widths, columns) - width))
            rows = [[shown(row[0], widths[0]) if row[0] else "", *row[1:]] for row in rows]
        lines = ["  ".join(row[column].ljust(widths[column]) for column in columns).rstrip() for row in rows]
        note = [f"left out to fit {width} columns: {', '.join(left_out)}"] if left_out else []
        if width is not None:
            lines = [line if len(line) <= width else line[: width - 3] + "..." for line in lines]
        return "\n".join([*lines, "", *map(printable, self.summary), *note])

    def html(self) -> str:
        """The summary, then the table, folded if it is long; everything escaped."""
        head, *rows = (
            "".join(f'<{tag} style="text-align:left">{html.escape(printable(cell))}</{tag}>' for cell in row)
            for tag, row in [("th", self.header), *(("td", row) for row in self.rows)]
        )
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        summary = "<br>".join(html.escape(printable(line)) for line in self.summary)
        opened = " open" if len(self.rows) <= OPEN_ROWS else ""
        return (
            f"<div><p>{summary}</p><details{opened}><summary>layers</summary>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></details></div>"
        )


def report_table(data: Mapping[str, Any]) -> Table:
    """One row a convolution, then the totals, of a report as plain data, before what is not finite is taken out.

    Similarity is the normalized one: blind to scale. The last line of the summary has the time and the file.
    """
    layers, totals = data["layers"], data["totals"]
    note = shared_reason(layers)
    device = f" on {data['device']}" if data["device"] else ""
    processes = f" in {data['processes']} processes" if data["processes"] > 1 else ""
    written = data["file"] is not None and data["file_bytes"] is not None
    file = f"{shown(data['file'], PATH)} ({_size_text(data['file_bytes'])})" if written else "no checkpoint written"
    end = f"{data['seconds']:.2f} s{device}{processes}, {file}"
    change = _change_of_totals(data)
    if any(layer["after"] for layer in layers):
        header, rows = CHANGED_HEADER, [_changed_row(layer, note) for layer in layers]
    elif any(layer["before"] for layer in layers):
        header, rows = MEASURED_HEADER, [_measured_row(layer, note) for layer in layers]
        count = sum(bool(layer["before"]) for layer in layers)
        rows.append([f"mean of {count}", "", *measure_cells(totals["before"]), ""])
        change = [f"sum of raw similarity {_raw_text(totals['before'])}"]
        end = f"{data['seconds']:.2f} s"
    else:
        header = UNTREATED_HEADER
        rows = [[*_title(layer), layer["outcome"], _remark(layer, None)] for layer in layers]
    shared = [f"each layer: {note}"] if note else []
    counts = f"{shown(data['model'] or 'model', PATH)}, {convolutions(totals['layers'])}: {outcomes_text(totals)}"
    return Table(header, rows, [counts, *data["remarks"], *change, *shared, end])


def report_cells(data: Mapping[str, Any]) -> list[str]:
    """The same data in a few words: outcomes, changes of the normalized similarity, time."""
    changes = [cell for kind, *change in _mean_changes(data) for cell in (*([kind] if kind else []), *change)]
    return [outcomes_text(data["totals"]), *changes, f"{data['seconds']:.2f} s"]


def as_csv(records: Sequence[Mapping[str, object]]) -> str:
    """Flat records with the same keys as comma-separated values, the keys in the first line.

    Texts are escaped as on a terminal, and an apostrophe stands before one that a spreadsheet would take for a formula.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(records[0] if records else [])
    writer.writerows([_plain(value) for value in record.values()] for record in records)
    return text.getvalue()


def measure_cells(measures: Mapping[str, float]) -> list[str]:
    """The measures of `COLUMNS`, ``-`` for those that are not there."""
    cells = []
    for name in COLUMNS.values():
        digits = ".3e" if name == "normalized_similarity" else ".4f"
        cells.append(format(measures[name], digits) if name in measures else "-")
    return cells


def _size_text(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def shape_text(shape: Sequence[int]) -> str:
    """A shape such as ``64x3x7x7``, or ``scalar``."""
    return "x".join(map(str, shape)) or "scalar"


def shared_reason(layers: Sequence[Mapping[str, Any]]) -> str | None:
    """The remark on all measured layers, if they have the same one."""
    reasons = {layer["reason"] for layer in layers if layer["before"]}
    return reasons.pop() if len(reasons) == 1 else None


def _length(widths: Mapping[int, int], columns: Sequence[int]) -> int:
    return sum(widths[column] + 2 for column in columns) - 2


def _title(layer: Mapping[str, Any]) -> list[str]:
    return [layer_name(layer["name"]), shape_text(layer["shape"])]


def _remark(layer: Mapping[str, Any], note: str | None) -> str:
    scaled = None if layer["factor"] is None else f"scaled by {layer['factor']:g}"
    return ": ".join(filter(None, [scaled, None if layer["reason"] == note else layer["reason"]]))


def _plain(value: object) -> object:
    if not isinstance(value, str):
        return value
    return ("'" if value.startswith(FORMULAS) else "") + printable(value)


def _changed_row(layer: Mapping[str, Any], note: str | None) -> list[str]:
    reason = _remark(layer, note)
    if not layer["after"]:
        return [*_title(layer), layer["outcome"], "", "", reason]
    return [*_title(layer), *_change([layer]), f"{layer['after']['norm_ratio']:.6f}", reason]


def _measured_row(layer: Mapping[str, Any], note: str | None) -> list[str]:
    remarks = [_remark(layer, note)] if layer["before"] else [layer["outcome"], _remark(layer, None)]
    return [*_title(layer), *measure_cells(layer["before"]), ": ".join(filter(None, remarks))]


def outcomes_text(totals: Mapping[str, Any]) -> str:
    """How many layers came to which outcome, such as ``3 initialized, 1 skipped``."""
    return ", ".join(f"{totals[name]} {name}" for name in OUTCOMES if name in totals)


def _change_of_totals(data: Mapping[str, Any]) -> list[str]:
    before, after = data["totals"]["before"], data["totals"]["after"]
    if not after:
        return []
    means = [
        f"mean normalized similarity{kind and f' of {kind}'} {change} ({share.strip()})"
        for kind, change, share in _mean_changes(data)
    ]
    ratio = f"norm ratio {after['norm_ratio']:.6f}"
    means = [f"{means[0]}, {ratio}"] if len(means) == 1 else [*means, ratio]
    return [*means, f"sum of raw similarity {_raw_text(before)} -> {_raw_text(after)}"]


def _raw_text(measures: Mapping[str, float]) -> str:
    raw = measures["similarity"]
    return format(raw, ".4g" if raw < 1e4 else ".0f")  # no exponent beside a number without


def _mean_changes(data: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The layers, and `_change` of them; separately for each kind of channels, if there are both kinds."""
    treated = [layer for layer in data["layers"] if layer["after"]]
    kinds = sorted({layer["channels"] or "" for layer in treated}, reverse=True)
    found = []
    for kind in kinds:
        layers = [layer for layer in treated if (layer["channels"] or "") == kind]
        name = f"{len(layers)} with channels {kind}" if len(kinds) > 1 else ""
        found.append((name, *_change(layers)))
    return found


def _change(layers: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Mean normalized similarity of treated layers before and after, and the share that is left."""
    old, new = (fmean(layer[when]["normalized_similarity"] for layer in layers) for when in ("before", "after"))
    return f"{old:.3e} -> {new:.3e}", f"{new / old:6.1%}" if old else ""
