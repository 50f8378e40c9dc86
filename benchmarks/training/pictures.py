"""One picture per case of the training benchmark: accuracy along the way, and what each arm gains."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.training.fit import points
from benchmarks.training.records import Case, Record
from benchmarks.training.summary import BASE, OURS, rows_of, standard_error

CURVES = (BASE, OURS, "one channel", "orthogonal", "patch-whitened", "convsim, matched channels")


def draw(records: list[Record], case: Case, path: Path) -> None:
    """Write the picture of a case; it needs final runs of the base."""
    _, rows = rows_of(records, case)
    with mpl.rc_context({"font.size": 9, "svg.hashsalt": "convsim"}):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for row in rows:
            if row.arm in CURVES:
                _curve(left, row.arm, row.runs, points(case.steps))
        left.set(xlabel="steps", ylabel="test accuracy, %, mean ± standard error")
        left.legend(frameon=False)
        compared = [row for row in rows if row.gain is not None][::-1]
        for position, row in enumerate(compared):
            right.errorbar(row.gain.mean, position, xerr=row.gain.half, fmt="o", color=_colour(row.arm), capsize=2)
        right.axvline(0, color="grey", linewidth=0.8)
        right.set_yticks(range(len(compared)), [row.arm for row in compared])
        right.set(xlabel="final accuracy over the base, points, 95 % interval")
        figure.suptitle(str(case))
        figure.savefig(path, dpi=130, metadata={"Software": None})


def draw_lengths(records: list[Record], cases: list[Case], path: Path) -> None:
    """Write one picture of runs of several lengths side by side: base and convsim, each gain above its panel."""
    with mpl.rc_context({"font.size": 9, "svg.hashsalt": "convsim"}):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        panels = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
        for axes, case in zip(panels, cases, strict=True):
            rows = {row.arm: row for row in rows_of(records, case)[1]}
            for arm in (BASE, OURS):
                _curve(axes, arm, rows[arm].runs, points(case.steps))
            gain = rows[OURS].gain
            assert gain is not None
            axes.set(xlabel="steps", title=f"{case.steps} steps: {gain:.1f} points")
        panels[0].set_ylabel("test accuracy, %, mean ± standard error")
        panels[0].legend(frameon=False)
        figure.savefig(path, dpi=130, metadata={"Software": None})


def _curve(axes, arm: str, runs: list[Record], steps: list[int]) -> None:
    columns = [[100 * value for value in column] for column in zip(*(run.curve for run in runs), strict=True)]
    means = [statistics.fmean(column) for column in columns]
    errors = [standard_error(column) for column in columns]
    axes.plot(steps, means, label=arm, color=_colour(arm))
    low, high = ([m + sign * e for m, e in zip(means, errors, strict=True)] for sign in (-1, 1))
    axes.fill_between(steps, low, high, color=_colour(arm), alpha=0.2, linewidth=0)


def _colour(arm: str) -> str:
    return f"C{CURVES.index(arm)}" if arm in CURVES else "black"
