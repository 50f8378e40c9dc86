"""The main command: build a model, decorrelate it, write it, and show what happened."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any

import click

from convsim_init.devices import describe_environment
from convsim_init.errors import RunError
from convsim_init.files.writing import STDOUT, check_new_folder, check_target
from convsim_init.models.spec import Source, parse
from convsim_init.models.zoo.catalog import UnknownModelError
from convsim_init.parallel.launch import launched
from convsim_init.plotting.figure import check_plot
from convsim_init.report.html import SUFFIXES as PAGE_SUFFIXES
from convsim_init.report.record import SUFFIXES as RECORD_SUFFIXES
from convsim_init.report.record import run_record
from convsim_init.report.text import did_you_mean
from convsim_init.settings import Settings

from ..completion import complete_models
from ..config import config_option, is_by_hand, origins
from ..devices import check_device_name, find_device
from ..options import UNDRAWN, refuse_given
from ..runs.plan import Run, parse_seeds, plan_runs
from ..runs.results import notes
from ..runs.run import UNTREATED, Choices, make, write
from ..runs.sweep import check_kept, sweep
from ..signals import exit_on_signal
from ..sources import ModelOptions, check_found, check_sources, is_file
from ..terminal import show_json, show_table, tell
from .init_options import init_options


def _check_out(path: Path, *, overwrite: bool) -> Path:
    if path != STDOUT:
        return check_target(path, overwrite=overwrite)
    if sys.stdout is None or sys.stdout.isatty():
        raise click.UsageError("--out -: expected stdout to go to a file or a program, got a terminal: add '> FILE'")
    return path


OF_ENTRIES = ("convs_only", "head", "without", "prefix", "dtype")  # that --out writes
TARGETS: dict[str, Callable[..., Path]] = {
    "out": _check_out,
    "record": partial(check_target, suffixes=(*RECORD_SUFFIXES, *PAGE_SUFFIXES)),
    "plot": check_plot,
}

HELP = """
Write a checkpoint of decorrelated weights, ready to train from.

MODEL is a name (see `convsim-init list`), torchvision:NAME, timm:NAME, transformers:CLASS, a folder with a config.json,
hf-hub:NAME of the local cache or a function of your own that returns a model: package.module:function or
path/to/file.py:function. Its convolutions are drawn as usual; then every layer's filters are
moved, without changing their norms, until their Convolutional Similarity (arXiv 2411.03226) is low. Or start from the
weights in a FILE (.safetensors, .pt, .pth, .ckpt and the like). What is written is an ordinary full state dict.
Without --out no weights are written: the table shows what would be gained.

Several MODELs and seeds are initialized one after the other, a line of the result for each; what was written before is
kept. {model} and {seed} in a file's name stand for the run's.

`torchrun --nproc-per-node N -m convsim_init MODEL` divides the work over N processes; the files are the same.
"""
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

    def get_help(self, ctx: click.Context) -> str:
        """The group's help, which shows this command's options."""
        return ctx.parent.get_help() if ctx.parent else super().get_help(ctx)


@config_option
@click.command(cls=MainCommand, help=HELP, epilog=EPILOG, hidden=True)
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
    settings: Settings,
    **options: Any,
) -> None:
    """Run the main command; what can be refused without torch is refused before it is loaded."""
    if is_by_hand("seed") != is_by_hand("seeds"):  # that one counts, whatever a file has for the other
        how, seeds = (how, None) if is_by_hand("seed") else (replace(how, seed=None), seeds)
        # `origins` is not to tell of one that does not count.
        del ctx.params["seeds" if is_by_hand("seed") else "seed"]
    folder, to_stdout = out is not None and out.endswith(("/", os.sep)), out == str(STDOUT)
    choices = Choices(
        settings=settings, how=how, writes=out is not None, folder=folder, origins=tuple(origins(ctx)), **options
    )
    force, drawn = choices.force, choices.base != "model"
    _check_no_command(ctx, models)
    check_sources(models, how, drawn=drawn)
    check_device_name(choices.device)
    if plot is None:
        refuse_given(["plot_layer"], UNDRAWN)
    if out is None:
        of_files = [*OF_ENTRIES, "force"] if record is None and plot is None else OF_ENTRIES
        refuse_given(of_files, "no weights are written without --out")
    starts = _starts(models, how, seeds, drawn=drawn)
    if folder:
        _check_whole(choices)
    if out is not None and Path(out) == STDOUT and not (to_stdout or folder):  # ./- is a file
        check_target(out)
    runs = plan_runs(starts, {"out": None if out is None else Path(out), "record": record, "plot": plot})
    alone = len(models) == 1 and seeds is None
    if to_stdout and (choices.as_json or not alone):
        raise click.UsageError("--out -: expected one run and no --json, which goes to stdout too: name a file")
    launch = launched()
    for run in runs if launch.on_first_machine else ():
        for kind, path in run.files.items():
            if not folder or kind != "out":
                # Of several runs what is there is kept, and not refused.
                TARGETS[kind](path, overwrite=force or not alone)
            elif alone or force or not path.exists():  # what is there of several is kept
                check_new_folder(path, overwrite=force)

    if choices.dry_run and not launch.leads:
        return
    if not alone and launch.on_first_machine:
        check_kept(runs, choices)
    progress = launch.leads and not choices.quiet and sys.stderr is not None and sys.stderr.isatty()
    from tqdm import tqdm

    # Of threads alone: of one for processes, made for hidden bars too, Python 3.14 tells after an interrupt.
    tqdm.set_lock(RLock())
    if choices.verbose:
        with exit_on_signal():
            environment = describe_environment()
        tell(*choices.origins, ", ".join(f"{name} {environment[name]}" for name in ("torch", "step", "threads")))
    if choices.quiet and not (choices.as_json or choices.dry_run or runs[0].files):
        tell("nothing is kept: --out, --report and --plot name files")
    meet = launch.size > 1 and not choices.dry_run
    if meet:
        with exit_on_signal():
            from convsim_init.parallel.processes import process_group

        find_device(choices.device)  # a rank that has none is refused before it meets the others
    with process_group(launch) if meet else nullcontext() as ranks:
        if not alone:
            sweep(runs, choices, ranks, progress=progress)
            return
        # The other ranks share in the work, and have no files to write.
        run = runs[0] if launch.leads else Run(runs[0].model, runs[0].seed)
        result = write(make(run, choices, progress=progress, group=ranks.group if ranks else None), choices)
        assert result.report is not None
        if choices.verbose:
            tell(*notes(result.report))
        if choices.as_json:
            show_json(run_record(result.report))
        elif not choices.quiet:
            show_table(result.report.table, err=to_stdout)
        elif UNTREATED in result.report.remarks and result.error is None:
            tell(UNTREATED)
        if result.error is not None:
            raise RunError(result.error)


def _check_no_command(ctx: click.Context, models: Sequence[str]) -> None:
    """Refuse what is a command, or may be one mistyped and is no model."""
    group = ctx.parent.command if ctx.parent else None
    commands = group.commands if isinstance(group, click.Group) else {}
    for model in models:
        if model in commands:
            raise click.UsageError(f"{model!r} is a command, not a model: write it before all options")
    first = models[0]
    # Looked up only where it may be a command mistyped: to look up a model's name imports torch.
    hint = did_you_mean(first, commands)
    if hint and parse(first).source is Source.ANY:
        try:
            check_found([first], None)
        except UnknownModelError as error:
            raise click.UsageError(f"{first!r} is neither a command nor a model{hint}") from error


def _check_whole(choices: Choices) -> None:
    """Refuse options that leave out or rename entries of a folder, which from_pretrained would then draw at random."""
    drop = choices.head == "drop"
    options = {
        "convs-only": choices.convs_only,
        "head drop": drop,
        "without": choices.without,
        "prefix": choices.prefix,
    }
    given = ", ".join(f"--{option}" for option, value in options.items() if value)
    if given:
        advice = "--num-classes N builds another classifier" if drop else "name a file for less"
        raise click.UsageError(f"{given}: expected a folder of all weights, for from_pretrained: {advice}")


def _starts(
    models: Sequence[str], how: ModelOptions, seeds: str | None, *, drawn: bool
) -> list[tuple[str, int | None]]:
    """Model and seed of each run; a file has a seed only if weights are drawn anew."""
    if seeds is None:
        return [(model, how.seed or 0 if drawn or not is_file(model) else None) for model in models]
    if how.seed is not None:
        raise click.UsageError("--seed and --seeds: choose one")
    for model in models:
        if is_file(model) and not drawn:
            raise click.UsageError(f"--seeds: {model!r} has its weights already; --base draws them anew")
    return [(model, seed) for model in models for seed in parse_seeds(seeds)]
