"""Results of the training benchmark: means, and differences to the base in pairs of equal seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from scipy import stats

from benchmarks.training.arms import ARMS
from benchmarks.training.fit import points
from benchmarks.training.records import Case, Record

BASE, OURS = "base", "convsim"
THRESHOLD = 0.9
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean, and how far the ends of its confidence interval (Student's t) are from it; NaN for one value."""

    mean: float
    half: float

    def __str__(self) -> str:
        return format(self)

    def __format__(self, digits: str) -> str:
        digits = digits or ".2f"
        if math.isnan(self.mean):
            return "no pair"
        mean = format(self.mean, "+" + digits)
        return f"{mean} (one pair)" if math.isnan(self.half) else f"{mean} ± {self.half:{digits}}"


@dataclass(frozen=True)
class Row:
    """Result of an arm at its best learning rate.

    Attributes:
        gain: Of final accuracy over the base, in points of a percent.
        saved: Steps to the threshold fewer than the base's, as a share of the base's mean, in percent.
        missed: Runs that never reached the threshold; they count with all their steps.
    """

    arm: str
    rate: float
    runs: list[Record]
    accuracy: str
    gain: Interval | None
    steps: str
    saved: Interval | None
    missed: int


def rows_of(records: Iterable[Record], case: Case, rate: float | None = None) -> tuple[float, list[Row]]:
    """The threshold of a case, a share of the base's mean final accuracy, and a row for each arm with final runs.

    Each arm at its tuned rate, or all at one rate.
    """
    records = sorted(
        (run for run in records if run.case == case), key=lambda run: (list(ARMS).index(run.arm), run.seed)
    )
    arms: dict[str, list[Record]] = {}
    for arm in dict.fromkeys(run.arm for run in records):
        wanted = _tuned_rate(records, case, arm) if rate is None else rate
        runs = [run for run in records if run.final and run.arm == arm and run.rate == wanted]
        if runs:
            arms[arm] = runs
    if BASE not in arms:
        return math.nan, []
    threshold = THRESHOLD * statistics.fmean(run.accuracy for run in arms[BASE])
    base_steps = statistics.fmean(steps_to(threshold, run)[0] for run in arms[BASE])
    rows = []
    for arm, runs in arms.items():
        reached = [steps_to(threshold, run) for run in runs]
        gain = saved = None
        if arm != BASE:
            gain = paired(runs, arms[BASE], lambda run: 100 * run.accuracy)
            saved = paired(runs, arms[BASE], lambda run: -100 * steps_to(threshold, run)[0] / base_steps)
        rows.append(
            Row(
                arm,
                runs[0].rate,
                runs,
                mean_and_error([100 * run.accuracy for run in runs]),
                gain,
                mean_and_error([steps for steps, _ in reached]),
                saved,
                sum(not found for _, found in reached),
            )
        )
    return threshold, rows


def steps_to(threshold: float, run: Record) -> tuple[float, bool]:
    """Steps until test accuracy first reaches a threshold, interpolated between tests; and whether it ever does."""
    tested = list(zip(points(run.case.steps), run.curve, strict=True))
    if tested[0][1] >= threshold:
        return tested[0][0], True
    for (before, low), (after, high) in pairwise(tested):
        if high >= threshold:
            return before + (after - before) * (threshold - low) / (high - low), True
    return run.case.steps, False


def paired(runs: Sequence[Record], base: Sequence[Record], value) -> Interval:
    """Mean difference between runs of equal seeds, with its confidence interval."""
    others = {run.seed: value(run) for run in base}
    return interval([value(run) - others[run.seed] for run in runs if run.seed in others])


def interval(values: Sequence[float]) -> Interval:
    """Mean and half the width of its confidence interval, by Student's t."""
    if len(values) < 2:
        return Interval(statistics.fmean(values) if values else math.nan, math.nan)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return Interval(statistics.fmean(values), quantile * standard_error(values))


def standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def mean_and_error(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.1f}"
    return f"{mean} ± {standard_error(values):.1f}" if len(values) > 1 else mean


def table(records: Iterable[Record], case: Case, rate: float | None = None) -> list[str]:
    """The table of a case, or of one rate there, in Markdown; empty where there is nothing to compare the base with."""
    threshold, rows = rows_of(records, case, rate)
    if len(rows) < 2:
        return []
    lines = [
        f"## {case}" if rate is None else f"### {case}: every arm at rate {rate:g}",
        "",
        f"Threshold {threshold:.1%}.",
        "",
        "| arm | rate | seeds | accuracy, % | gain over base, points "
        "| steps to threshold | fewer than base, % | missed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row.arm, f"{row.rate:g}", str(len(row.runs)), row.accuracy, str(row.gain or ""), row.steps]
        lines.append("| " + " | ".join([*cells, str(row.saved or ""), str(row.missed or "")]) + " |")
    return [*lines, ""]


def comparisons(records: Sequence[Record], case: Case) -> list[str]:
    """What convsim gains in final accuracy over other arms, over the base ten seeds at a time, and at full width."""
    runs = {row.arm: row.runs for row in rows_of(records, case)[1]}
    ours = runs.pop(OURS, None)
    if ours is None:
        return []
    over = {f"over {arm}": (ours, others) for arm, others in runs.items()}
    for first in range(0, len(ours), 10) if len(ours) > 10 else ():
        some = [run for run in ours if first <= run.seed < first + 10]
        over[f"over {BASE}, seeds {first} to {first + len(some) - 1}"] = (some, runs[BASE])
    if case.width != 1:
        full = {row.arm: row.runs for row in rows_of(records, replace(case, width=1.0))[1]}
        over |= {f"over {BASE} of width 1": (ours, full[BASE])} if BASE in full else {}
    lines = [f"- {name}: {paired(*pair, lambda run: 100 * run.accuracy)}" for name, pair in over.items()]
    return [f"{OURS}, points of final accuracy:", "", *lines, ""]


def _tuned_rate(records: Sequence[Record], case: Case, arm: str) -> float:
    """The best one of the tuning round, or the only one of the final round."""
    tuned, final = dict[float, list[float]](), set[float]()
    for run in records:
        if run.case == case and run.arm == arm:
            if run.final:
                final.add(run.rate)
            else:
                tuned.setdefault(run.rate, []).append(run.accuracy)
    return max(tuned, key=lambda rate: statistics.fmean(tuned[rate])) if tuned else min(final)
