"""A run as one page for a browser: the layers, sortable, their pictures, settings and versions. Imports no torch.

The page's own policy lets it load nothing from elsewhere and run no script but the one here. Every text is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
from collections.abc import Mapping, Sequence
from string import Template
from typing import Any

from convsim_init.report.record import run_record
from convsim_init.report.report import Report
from convsim_init.report.text import layer_name, printable

SUFFIXES = (".html",)
COLUMNS = (  # headings, and the columns' names in `Report.to_records`
    ("layer", "name"), ("shape", "shape"), ("outcome", "outcome"),
    ("similarity", "normalized_similarity_before"), ("after", "normalized_similarity_after"),
    ("corr-natural", "feature_correlation_natural_before"), ("after", "feature_correlation_natural_after"),
    ("rank-natural", "effective_rank_natural_before"), ("after", "effective_rank_natural_after"),
    ("norm ratio", "norm_ratio_after"), ("steps", "steps"), ("seconds", "seconds"), ("remark", "reason"),
)  # fmt: skip
TEXTS = ("name", "shape", "outcome", "reason")  # the other columns are numbers
# For texts a - b is NaN, which counts as false: they are ordered by localeCompare.
SCRIPT = """
const table = document.querySelector("table");
table.querySelectorAll("tbody button").forEach(button => button.onclick = () => {
  const open = button.ariaExpanded !== "true";
  button.ariaExpanded = open;
  button.closest("tbody").rows[1].hidden = !open;
});
const value = (body, column) => body.rows[0].cells[column].dataset.value ?? "";
table.querySelectorAll("th").forEach((head, column) => head.querySelector("button").onclick = () => {
  const turn = head.ariaSort === "descending" ? 1 : -1;
  table.querySelectorAll("th").forEach(other => other.ariaSort = null);
  head.ariaSort = turn < 0 ? "descending" : "ascending";
  const order = (a, b) => (a === "") - (b === "") || turn * (a - b || a.localeCompare(b, "en", {numeric: true}));
  table.append(...[...table.tBodies].sort((a, b) => order(value(a, column), value(b, column))));
});
"""
STYLE = """
:root { color-scheme: light dark; --line: #8884; --back: #fff; --text: #1f2328; --accent: #0969da }
@media (prefers-color-scheme: dark) { :root { --back: #0d1117; --text: #e6edf3; --accent: #58a6ff } }
body { background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem auto;
  max-width: 80rem; padding: 0 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem; text-align: left }
td:first-child, th:first-child { background: var(--back); left: 0; padding-left: 0; position: sticky }
@media (max-width: 40rem) { tr:first-child td:first-child { max-width: 40vw; min-width: 9rem; white-space: normal } }
.number { text-align: right }
button { background: none; border: 0; color: inherit; cursor: pointer; font: inherit; padding: 0; text-align: inherit }
th button { font-weight: 600 } td button { color: var(--accent) } td button::before { content: "▸ " }
td button[aria-expanded=true]::before { content: "▾ " }
th[aria-sort=descending] button::after { content: " ↓" } th[aria-sort=ascending] button::after { content: " ↑" }
tr + tr td { position: static; white-space: normal }
tr + tr div { left: 0; max-width: calc(100vw - 2rem); position: sticky; width: max-content }
figure { display: inline-block; margin: .5rem 1rem .5rem 0; vertical-align: top }
figure img, figure svg { display: block; height: 9.5rem; image-rendering: pixelated; max-width: 100% }
figcaption { font-size: .85rem }
dl { display: grid; gap: .1rem 1.5rem; grid-template-columns: max-content 1fr } dd { margin: 0 }
"""
# The policy has hashes of the style and the script: nothing else may stand in their tags.
PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'sha256-$style_hash'; \
script-src 'sha256-$script_hash'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<h1>$title</h1>
<p>$summary</p>
<h2>Layers</h2>
<p>A click on a heading sorts. One on a layer shows its first filters (their strongest channel, if there are not three),
grey for zero, and the correlations of their feature maps, both on one scale before and after; and its loss.</p>
<div class="wide"><table><thead><tr>$head</tr></thead>
$rows
</table></div>
<h2>Settings</h2>
$settings
<h2>Versions</h2>
$versions
<script>$script</script>
</body>
</html>
""")


def page(report: Report, pictures: Mapping[str, Mapping[str, str]]) -> str:
    """The text of a page on a run; ``pictures`` maps a layer's name to ``{caption: data URL}``."""
    data = run_record(report)
    chosen = {name: data[name] for name in ("model", "seed", "base", "device", "processes", "file")} | data["settings"]
    records = report.to_records()
    columns = {key: title for title, key in COLUMNS if any(record.get(key) is not None for record in records)}
    heads = (f'<th{_number(key)}><button type="button">{title}</button></th>' for key, title in columns.items())
    rows = [
        _row({key: record.get(key) for key in columns}, layer.losses, pictures.get(layer.name, {}))
        for record, layer in zip(records, report.layers, strict=True)
    ]
    return PAGE.substitute(
        title=_escaped(report.model or "model"),
        summary="<br>\n".join(map(_escaped, report.table.summary)),
        head="".join(heads),
        rows="\n".join(rows),
        settings=_list(chosen),
        versions=_list(data["versions"]),
        style=STYLE,
        style_hash=_hash(STYLE),
        script=SCRIPT,
        script_hash=_hash(SCRIPT),
    )


def _row(record: Mapping[str, Any], losses: Sequence[float], pictures: Mapping[str, str]) -> str:
    images = [f'<img alt="" src="{_escaped(url)}"><figcaption>{caption}' for caption, url in pictures.items()]
    images += [f"{_curve(losses)}<figcaption>loss by step, logarithmic"] if len(losses) > 1 else []
    name = _escaped(layer_name(record["name"]))
    title = f'<button type="button" aria-expanded="false">{name}</button>' if images else name
    row = f'<td data-value="{name}">{title}</td>'
    row += "".join(_cell(key, value) for key, value in record.items() if key != "name")
    if images:
        figures = "".join(f"<figure>{image}</figcaption></figure>" for image in images)
        row += f'</tr><tr hidden><td colspan="{len(record)}"><div>{figures}</div></td>'
    return f"<tbody><tr>{row}</tr></tbody>"


def _cell(key: str, value: object) -> str:
    if value is None:
        return "<td></td>"
    shown = _escaped(f"{value:.4g}" if isinstance(value, float) else value)
    return f'<td{_number(key)} data-value="{_escaped(value)}">{shown}</td>'


def _number(key: str) -> str:
    return "" if key in TEXTS else ' class="number"'


def _curve(losses: Sequence[float]) -> str:
    """The losses on a logarithmic scale as a line, 10 units for each factor of ten below the start."""
    depths = [-math.log10(max(loss / losses[0], 1e-9)) if losses[0] > 0 else 0.0 for loss in losses]
    points = " ".join(f"{step},{depth * 10:.2f}" for step, depth in enumerate(depths))
    # One unit more above and below, where half of the line's width would be cut off.
    box = f"0 -1 {len(losses)} {max(depths) * 10 + 2:.2f}"
    line = f'<polyline points="{points}" fill="none" stroke="currentColor" vector-effect="non-scaling-stroke"/>'
    return f'<svg viewBox="{box}" preserveAspectRatio="none" width="152">{line}</svg>'


def _list(entries: Mapping[str, object]) -> str:
    items = (f"<dt>{_escaped(name)}</dt><dd>{_escaped(value)}</dd>" for name, value in entries.items())
    return f"<dl>{''.join(items)}</dl>"


def _escaped(value: object) -> str:
    return html.escape(printable("-" if value is None else str(value)))


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
