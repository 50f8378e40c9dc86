"""One run of the main command: build or read a model, decorrelate it, write what was asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from convsim_init.devices import find_device
from convsim_init.plots import choose_layer, figure_of_run, save_figure
from convsim_init.record import save_record
from convsim_init.report import Outcome, Report
from convsim_init.runs import Run
from convsim_init.settings import Base, Settings

from .ending import ending_at_once
from .source import ModelOptions, load


@dataclass(frozen=True)
class Choices:
    """What the user chose for every run of the command; the options of the same names say what each means."""

    settings: Settings
    how: ModelOptions
    like: str | None
    base: Base
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    device: str
    convs_only: bool
    prefix: str
    dtype: str
    plot_layer: str | None
    force: bool
    dry_run: bool


def carry_out(run: Run, choices: Choices, *, progress: bool) -> Report:
    """Do the run; where a layer fails, nothing is written and `failure` says so.

    Raises:
        InputError: If the model cannot be built or treated as asked, or a file cannot be written.
        RunError: If writing fails.
    """
    with ending_at_once():
        import torch

        from convsim_init.base import draw_base_
        from convsim_init.checkpoint import save_checkpoint
        from convsim_init.initialize import initialize_, plan
        from convsim_init.snapshot import take_snapshot

    device = find_device(choices.device)
    start = load(run.model, replace(choices.how, seed=run.seed), choices.like)
    network = start.content
    settings, layers = choices.settings, {"include": choices.include, "exclude": choices.exclude}
    if choices.dry_run:
        report = plan(network, settings=settings, **layers)
    else:
        draw_base_(network, choices.base, seed=run.seed or 0, **layers)
        before = take_snapshot("before", network, copy=True) if run.files.record or run.files.plot else None
        if before is not None and choices.plot_layer is not None:
            choose_layer([before], choices.plot_layer)
        report = initialize_(network, settings=settings, device=device, progress=progress, **layers)
        if before is not None:
            after = take_snapshot("after", network)
            report = report.with_measures(before.report, after.report)
    report.model, report.seed, report.base = start.name, run.seed, choices.base
    report.remarks += start.remarks
    if choices.dry_run or failure(report) is not None:
        return report
    if not any(layer.after for layer in report.layers):
        report.remarks.append("no convolution was treated: the weights are as they were")
    files = run.files
    if files.out is not None:
        save_checkpoint(
            network,
            files.out,
            report=report,
            prefix=choices.prefix,
            convs_only=choices.convs_only,
            dtype=getattr(torch, choices.dtype),
            overwrite=choices.force,
        )
        report.file, report.file_bytes = str(files.out), files.out.stat().st_size
    if files.record is not None:
        save_record(report, files.record, overwrite=choices.force)
    if files.plot is not None and before is not None:
        figure = figure_of_run(report, before, after, layer=choices.plot_layer)
        save_figure(figure, files.plot, overwrite=choices.force)
    return report


def failure(report: Report) -> str | None:
    """Which layers of a run failed and why; None if none did."""
    failed = [layer for layer in report.layers if layer.outcome is Outcome.FAILED]
    if not failed:
        return None
    first, others = failed[0], len(failed) - 1
    more = f" and {others} more" if others else ""
    return f"{first.name}{more} failed, {first.reason}; nothing was written; --exclude leaves a layer alone"
