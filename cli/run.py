"""One run of the main command: build or read a model, decorrelate it, write what was asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from convsim_init.cli.plan import Run
from convsim_init.devices import find_device
from convsim_init.plotting.figure import choose_layer, figure_of_run, is_dark, save_figure
from convsim_init.report.record import save_record
from convsim_init.report.report import Outcome, Report
from convsim_init.settings import Base, Settings

from .options import ModelOptions, load
from .signals import ending_at_once

if TYPE_CHECKING:
    import torch.distributed as dist

    from convsim_init.checkpoint.save import Contents
    from convsim_init.metrics.snapshot import Snapshot


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


@dataclass(frozen=True)
class Made:
    """What a run came to, before anything is written of it: a process may hand it to another.

    Attributes:
        run: The run.
        report: What became of its layers.
        checkpoint: What is to be written, if that was asked for.
        before: The convolutions before, if they are to be recorded or drawn.
        after: The same after.
    """

    run: Run
    report: Report
    checkpoint: Contents | None = None
    before: Snapshot | None = None
    after: Snapshot | None = None


def make(run: Run, choices: Choices, *, progress: bool = False, group: dist.ProcessGroup | None = None) -> Made:
    """Do all of the run but the writing; where a layer fails, `failure` says so and nothing is to be written.

    Args:
        run: With the files that this process is to write, if any.
        choices: How.
        progress: Whether to show a bar.
        group: Processes that the layers are divided over, all of which do this.

    Raises:
        InputError: If the model cannot be built or treated as asked.
        RunError: If a process of the group has died.
    """
    with ending_at_once():
        import torch

        from convsim_init.checkpoint.save import checkpoint_contents
        from convsim_init.initialize import initialize_, plan
        from convsim_init.layers.draw import draw_base_
        from convsim_init.metrics.snapshot import take_snapshot

    device = find_device(choices.device)
    start = load(run.model, replace(choices.how, seed=run.seed), choices.like)
    network = start.content
    settings, layers = choices.settings, {"include": choices.include, "exclude": choices.exclude}
    before = after = checkpoint = None
    if choices.dry_run:
        report = plan(network, settings=settings, **layers)
    else:
        draw_base_(network, choices.base, seed=run.seed or 0, **layers)
        if run.files.record or run.files.plot:
            before = take_snapshot("before", network, copy=True)
            if choices.plot_layer is not None:
                choose_layer([before], choices.plot_layer)
        report = initialize_(network, settings=settings, device=device, progress=progress, group=group, **layers)
        if before is not None:
            after = take_snapshot("after", network)
            report = report.with_measures(before.report, after.report)
    report.model, report.seed, report.base = start.name, run.seed, choices.base
    report.remarks += start.remarks
    if choices.dry_run or failure(report) is not None:
        return Made(run, report)
    if not any(layer.after for layer in report.layers):
        report.remarks.append("no convolution was treated: the weights are as they were")
    if run.files.out is not None:
        checkpoint = checkpoint_contents(
            network,
            report=report,
            prefix=choices.prefix,
            convs_only=choices.convs_only,
            dtype=getattr(torch, choices.dtype),
        )
    return Made(run, report, checkpoint, before, after)


def write(made: Made, choices: Choices) -> Report:
    """Write what a run came to.

    Raises:
        InputError: If a file cannot be written.
        RunError: If writing fails.
    """
    report, files = made.report, made.run.files
    if made.checkpoint is not None and files.out is not None:
        from convsim_init.checkpoint.save import write_checkpoint

        write_checkpoint(made.checkpoint, files.out, overwrite=choices.force)
        report.file, report.file_bytes = str(files.out), files.out.stat().st_size
    if made.before is None or made.after is None:
        return report
    if files.record is not None:
        save_record(report, files.record, overwrite=choices.force)
    if files.plot is not None:
        figure = figure_of_run(report, made.before, made.after, layer=choices.plot_layer, dark=is_dark(files.plot))
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
