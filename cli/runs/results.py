"""Results of runs, as data and as lines for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from convsim_init.report.record import run_record
from convsim_init.report.report import Outcome, Report
from convsim_init.report.text import PATH, layer_name, printable, quoted_layer, shown, some

from .plan import Run

if TYPE_CHECKING:
    from convsim_init.checkpoint.save import Contents
    from convsim_init.metrics.snapshot import Snapshot


class Status(str, Enum):
    """How a run ended."""

    DONE = "done"
    KEPT = "kept"  # its files were there already
    PLANNED = "planned"  # a dry run
    FAILED = "failed"


@dataclass(frozen=True)
class Result:
    """Result of a run; it holds what is to be written until that is done, perhaps by another process."""

    run: Run  # the run, with the files that it writes, or with all of its files if they were kept
    status: Status  # how the run ended, or will have ended once it is written
    report: Report | None = None  # what became of its layers, if it came that far
    error: str | None = None  # why it failed
    checkpoint: Contents | None = None  # the checkpoint that is to be written
    config: str | None = None  # the config that is to be written beside it, in a folder
    drawn: bool = True  # whether all weights were drawn and none read from a file
    snapshots: tuple[Snapshot, Snapshot] | None = None  # the network before and after, for a record or a picture

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data: ``status``, ``error`` and the run's record, if any, with the model as given."""
        kept = self.run.out if self.status is Status.KEPT else None
        rest = {"file": kept and str(kept)} if self.report is None else run_record(self.report)
        run = {"model": self.run.model, "seed": self.run.seed}
        return {"status": self.status.value, "error": self.error} | rest | run

    def line(self, width: int = 0) -> str:
        """The result as one line for people; the run's name is padded to that width."""
        cells = [self.run.name.ljust(width)]
        if self.report is None or self.error is not None:
            cells += [": ".join(filter(None, [self.status.value, self.error]))]
        else:
            cells += self.report.cells
        if self.error is None:
            cells += [shown(str(path), PATH) for path in self.run.files.values()]
        return printable("  ".join(cells))


def summary(results: Sequence[Result], runs: int, *, folders: bool = False) -> str:
    """The remarks of all results, each once, and a line that counts the runs by their status.

    A remark that does not hold for all models is told with the names of those for which it does.
    """
    models = {result.run.model for result in results if result.report}
    named: dict[str, dict[str, None]] = {}
    for result in results:
        for remark in result.report.remarks if result.report else ():
            named.setdefault(remark, {})[shown(result.run.model, PATH)] = None
    remarks = [remark if len(names) == len(models) else f"{some(names)}: {remark}" for remark, names in named.items()]
    counts = Counter(result.status for result in results)
    parts = [f"{counts[status]} {status.value}" for status in Status if counts[status]]
    if len(results) < runs:
        parts.append(f"{runs - len(results)} not run")
    redo = "; --force redoes what was kept" if counts[Status.KEPT] and not folders else ""
    return "\n".join(map(printable, [*remarks, f"{runs} runs: {', '.join(parts)}{redo}"]))


def notes(report: Report) -> list[str]:
    """Lines on what the table does not show: how long each layer took, or why it was left alone."""
    name = shown(report.model or "model", PATH)
    lines = [f"{name}: {'weights read' if report.seed is None else f'drawn with seed {report.seed}'}"]
    for layer in report.layers:
        done = f"{layer.steps} steps, {layer.seconds:.2f} s" if layer.steps else layer.reason
        lines.append(f"{layer_name(layer.name)}: {layer.outcome.value}" + (f": {done}" if done else ""))
    return [printable(line) for line in lines]


def failures(results: Sequence[Result]) -> str | None:
    """One line that names the runs that failed and says why; None if none did."""
    named: dict[str, list[str]] = {}
    for result in results:
        if result.error is not None:
            named.setdefault(result.error, []).append(result.run.name)
    if not named:
        return None
    reasons = "; ".join(f"{some(names, 3)}: {error}" for error, names in named.items())
    return f"{sum(map(len, named.values()))} of {len(results)} runs failed; {reasons}"


def failure(report: Report) -> str | None:
    """One line that names the layers of a run that failed and says why; None if none did."""
    failed = [layer for layer in report.layers if layer.outcome is Outcome.FAILED]
    if not failed:
        return None
    names = some([quoted_layer(layer.name) for layer in failed], 1)
    advice = "--base draws layers anew, --exclude leaves them alone, --without leaves them out of the file"
    return f"layer {names} failed, {failed[0].reason}; nothing was written; {advice}"
