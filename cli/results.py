"""What became of each of many runs, as data and as lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from convsim_init.cli.plan import Run
from convsim_init.report.report import Report
from convsim_init.report.table import printable, report_cells


class Status(str, Enum):
    """What became of a run."""

    DONE = "done"
    KEPT = "kept"  # its files were there already
    PLANNED = "planned"  # nothing was to be done
    FAILED = "failed"


@dataclass(frozen=True)
class Result:
    """What became of one of many runs.

    Attributes:
        run: Which one, with the files that it wrote or would have; all of its files if they were kept.
        status: What became of it.
        report: Its report, if it came to that.
        error: Why it failed.
    """

    run: Run
    status: Status
    report: Report | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data: that of the report, if there is one, after ``status`` and ``error``."""
        data = {"status": self.status.value, "error": self.error, "model": self.run.model, "seed": self.run.seed}
        if self.report is not None:
            return data | self.report.to_dict()
        kept = self.run.files.out if self.status is Status.KEPT else None
        return data | {"file": kept and str(kept)}

    def line(self, width: int = 0) -> str:
        """The result as people read it.

        Args:
            width: Of the run's name, so that the lines of several stand in columns.
        """
        cells = [self.run.name.ljust(width)]
        if self.report is None or self.error is not None:
            cells += [": ".join(filter(None, [self.status.value, self.error]))]
        else:
            cells += report_cells(self.report.to_dict())
        if self.error is None:
            cells += [str(path) for path in self.run.files.paths]
        return printable("  ".join(cells))


def summary(results: Sequence[Result], runs: int) -> str:
    """The remarks of all results, each once, and how many of so many runs had each status."""
    remarks = dict.fromkeys(remark for result in results if result.report for remark in result.report.remarks)
    counts = Counter(result.status for result in results)
    told = [f"{counts[status]} {status.value}" for status in Status if counts[status]]
    if len(results) < runs:
        told.append(f"{runs - len(results)} not run")
    redo = "; --force redoes what was kept" if counts[Status.KEPT] else ""
    return "\n".join(map(printable, [*remarks, f"{runs} runs: {', '.join(told)}{redo}"]))


def failures(results: Sequence[Result]) -> str | None:
    """Which of the runs failed and why, in one line; None if none did."""
    named: dict[str, list[str]] = {}
    for result in results:
        if result.error is not None:
            named.setdefault(result.error, []).append(result.run.name)
    if not named:
        return None
    total = sum(map(len, named.values()))
    told = "; ".join(f"{_some(names)}: {error}" for error, names in named.items())
    return f"{total} of {len(results)} runs failed; {told}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
