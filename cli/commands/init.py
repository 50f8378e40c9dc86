"""The main command: build a model, decorrelate it, write it, and show what happened."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import click

from convsim_init.devices import describe_environment
from convsim_init.errors import RunError
from convsim_init.files.writing import STDOUT
from convsim_init.parallel.launch import launched
from convsim_init.report.record import run_record

from ..completion import complete_models
from ..config import is_by_hand, origins
from ..devices import find_device
from ..runs.plan import Run, plan_runs
from ..runs.results import Result, notes
from ..runs.run import UNTREATED, Choices, make, write
from ..runs.sweep import check_kept, sweep
from ..signals import exit_on_signal
from ..sources import ModelOptions
from ..terminal import show_json, show_table, tell
from .init_checks import TARGETS, check_no_command, check_options, check_out, check_targets, plan_starts
from .init_options import init_options

if TYPE_CHECKING:
    from convsim_init.parallel.processes import Ranks

EPILOG = """\b
Examples:
  convsim-init resnet18 --out init.safetensors
  convsim-init resnet50 --num-classes 10 --seed 3 --out r50.pt
  convsim-init timm:convnext_atto --model-arg drop_path_rate=0.1
  convsim-init weights.pt --like timm:regnety_002 --out init.safetensors
  convsim-init cifar_resnet18 --exclude conv1 --steps 50 --out init.safetensors
  convsim-init resnet18 resnet34 --seeds 0:5 --out '{model}-s{seed}.safetensors'
  convsim-init resnet18 --preset paper --steps 200 --json
"""


class MainCommand(click.Command):
    """A command that is run by its group's name alone, and so shares the group's help."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments, and refuse a second file of one kind, which click would write alone."""
        words = list(args)  # the parser takes them out of its list
        rest = super().parse_args(ctx, args)
        _, _, given = self.make_parser(ctx).parse_args(args=words)
        for parameter in given:
            if parameter.name in TARGETS and given.count(parameter) > 1:
                raise click.UsageError(f"{max(parameter.opts, key=len)}: expected one file, got several", ctx)
        return rest

    def get_help(self, ctx: click.Context) -> str:
        """The group's help, which shows this command's options."""
        return ctx.parent.get_help() if ctx.parent else super().get_help(ctx)


@click.command(cls=MainCommand, epilog=EPILOG, hidden=True)
@click.argument("models", metavar="MODEL|FILE...", nargs=-1, required=True, shell_complete=complete_models)
@init_options
@click.pass_context
def init(
    ctx: click.Context,
    /,
    models: tuple[str, ...],
    out: str | None,
    record: Path | None,
    plot: Path | None,
    seeds: str | None,
    how: ModelOptions,
    **options: Any,
) -> None:
    """Write a checkpoint of decorrelated weights, ready to train from.

    MODEL is a built-in name (see `convsim-init list`), torchvision:NAME, timm:NAME, transformers:CLASS, a folder with a
    config.json, hf-hub:NAME from the local cache, or your own function that returns a model: package.module:function or
    path/to/file.py:function. Its weights are drawn as usual. Then the filters of each convolution are moved, without
    changing their norms, until their Convolutional Similarity (arXiv 2411.03226) is low. A FILE (.safetensors, .pt,
    .pth, .ckpt and the like) gives weights to start from instead. --out is written as an ordinary full state dict;
    without it no weights are written, and the table shows what would be gained.

    Several MODELs or seeds are done one after the other, with a line for each; files that exist already are kept.
    {model} and {seed} in a file's name stand for those of each run.

    `torchrun --nproc-per-node N -m convsim_init MODEL` divides the work among N processes and writes the same files.
    """
    # One of the two on the command line voids the other from elsewhere, of which `origins` is not to tell then.
    if is_by_hand("seed") and not is_by_hand("seeds"):
        seeds = None
        del ctx.params["seeds"]
    elif is_by_hand("seeds") and not is_by_hand("seed"):
        how = replace(how, seed=None)
        del ctx.params["seed"]
    folder = out is not None and out.endswith(("/", os.sep))
    choices = Choices(how=how, writes=out is not None, folder=folder, origins=tuple(origins(ctx)), **options)
    check_no_command(ctx, models)
    if out is not None:
        check_out(out, choices)  # first, for `-out init.pt` means the name "ut" and another model
    check_options(models, choices, record=record, plot=plot)
    starts = plan_starts(models, seeds, choices)
    runs = plan_runs(starts, {"out": None if out is None else Path(out), "record": record, "plot": plot})
    alone = len(models) == 1 and seeds is None
    to_stdout = out == str(STDOUT)
    if to_stdout and (choices.as_json or not alone):
        raise click.UsageError("--out -: expected one run and no --json, which goes to stdout too: name a file")
    launch = launched()
    if launch.on_first_machine:
        check_targets(runs, choices, alone=alone)

    if choices.dry_run and not launch.leads:
        return
    if not alone and launch.on_first_machine:
        check_kept(runs, choices)
    progress = launch.leads and not choices.quiet and sys.stderr is not None and sys.stderr.isatty()
    from tqdm import tqdm

    # A lock for threads alone: Python 3.14 reports one for processes, made for hidden bars too, after an interrupt.
    tqdm.set_lock(RLock())
    _tell_beforehand(runs, choices)
    with _processes(choices) as ranks:
        if not alone:
            sweep(runs, choices, ranks, progress=progress)
            return
        # The other ranks share in the work, and have no files to write.
        run = runs[0] if launch.leads else Run(runs[0].model, runs[0].seed)
        result = write(make(run, choices, progress=progress, group=ranks.group if ranks else None), choices)
        _show(result, choices, err=to_stdout)


def _tell_beforehand(runs: Sequence[Run], choices: Choices) -> None:
    """Tell what computes, if that was asked for, and that nothing is kept, if so."""
    if choices.verbose:
        with exit_on_signal():
            environment = describe_environment()
        tell(*choices.origins, ", ".join(f"{name} {environment[name]}" for name in ("torch", "step", "threads")))
    if choices.quiet and not (choices.as_json or choices.dry_run or runs[0].files):
        tell("nothing is kept: --out, --report and --plot name files")


def _processes(choices: Choices) -> AbstractContextManager[Ranks | None]:
    """The processes that torchrun started, which share the work; None if this is the only one that has any."""
    launch = launched()
    if launch.size == 1 or choices.dry_run:
        return nullcontext()
    with exit_on_signal():
        from convsim_init.parallel.processes import process_group

    find_device(choices.device)  # a rank that has none is refused before it meets the others
    return process_group(launch)


def _show(result: Result, choices: Choices, *, err: bool) -> None:
    """Show the result of the only run, its table perhaps on stderr, or raise the error that it ended with."""
    report = result.report
    assert report is not None
    if choices.verbose:
        tell(*notes(report))
    if choices.as_json:
        show_json(run_record(report))
    elif not choices.quiet:
        show_table(report.table, err=err)
    elif UNTREATED in report.remarks and result.error is None:
        tell(UNTREATED)
    if result.error is not None:
        raise RunError(result.error)
