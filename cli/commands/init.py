"""The main command: build a model, decorrelate it, write it, and show what happened."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from convsim_init.cli.plan import Run, parse_seeds, plan_runs
from convsim_init.cli.results import notes
from convsim_init.devices import check_device_name, describe_environment, find_device
from convsim_init.errors import InputError, RunError
from convsim_init.files import STDOUT, SUFFIXES, check_new_folder, check_target
from convsim_init.models.spec import Source, parse
from convsim_init.models.zoo.catalog import UnknownModelError
from convsim_init.parallel.launch import Launch, launched
from convsim_init.plotting.figure import check_plot
from convsim_init.report.html import SUFFIXES as PAGE_SUFFIXES
from convsim_init.report.record import SUFFIXES as RECORD_SUFFIXES
from convsim_init.report.record import run_record
from convsim_init.report.text import did_you_mean
from convsim_init.settings import (
    ACTIVATIONS,
    CHANNELS_CHOICES,
    NORMS,
    PAIRS,
    PRESETS,
    SCHEMES,
    Preset,
    Settings,
    parse_base,
)

from ..completion import complete_bases, complete_layers, complete_models
from ..config import config_option, is_by_hand, origins
from ..options import ModelOptions, Whole, check_found, check_sources, is_file, key_option, like_option, model_options
from ..run import UNTREATED, Choices, make, write
from ..signals import exit_on_signal
from ..sweep import sweep
from ..terminal import needs_stdout, show_json, show_table, tell

if TYPE_CHECKING:
    from convsim_init.parallel.processes import Ranks

HEADS = ("keep", "drop")
DTYPES = ("float32", "float16", "bfloat16", "float64")


def _check_out(path: Path, *, overwrite: bool) -> Path:
    if path != STDOUT:
        return check_target(path, overwrite=overwrite)
    if sys.stdout is None or sys.stdout.isatty():
        raise click.UsageError("--out -: expected stdout to go to a file or a program, got a terminal: add '> FILE'")
    return path


REPORTS = (*RECORD_SUFFIXES, *PAGE_SUFFIXES)
TARGETS: dict[str, Callable[..., Path]] = {
    "out": _check_out,
    "record": partial(check_target, suffixes=REPORTS),
    "plot": check_plot,
}
DEFAULTS, PAPER = Settings(), Settings.paper()

HELP = """
Write a checkpoint of decorrelated weights, ready to train from.

MODEL is a name (see `convsim-init list`), torchvision:NAME, timm:NAME, transformers:CLASS, a folder with a config.json,
hf-hub:NAME of the local cache or a function of your own that returns a model: package.module:function or
path/to/file.py:function. Its convolutions are drawn as usual; then every layer's filters are
moved, without changing their norms, until their Convolutional Similarity (arXiv 2411.03226) is low. Or start from the
weights in a FILE (.safetensors, .pt, .pth, .ckpt and the like). What is written is an ordinary full state dict.
Without --out nothing is written: the table alone shows what would be gained.

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


def _input_shape(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Channels and sizes of an input as a user types them: ``3x224x224``."""
    if value is None:
        return None
    sizes = value.split("x")
    if len(sizes) < 2 or not all(size.isdecimal() and int(size) for size in sizes):
        raise click.BadParameter(f"expected channels and sizes such as 3x224x224, got {value!r}", ctx, param)
    return tuple(map(int, sizes))


class BaseType(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """What the convolutions are drawn anew by, as in `parse_base`."""

    name = "scheme"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text itself, if it is one."""
        try:
            parse_base(value)
        except InputError as error:
            self.fail(str(error), param, ctx)
        return value


class MainCommand(click.Command):
    """A command that is run by its group's name alone, and so shares the group's help."""

    def get_help(self, ctx: click.Context) -> str:
        """The group's help, which shows this command's options."""
        return ctx.parent.get_help() if ctx.parent else super().get_help(ctx)


@config_option
@click.command(cls=MainCommand, help=HELP, epilog=EPILOG, hidden=True)
@click.argument("models", metavar="MODEL|FILE...", nargs=-1, required=True, shell_complete=complete_models)
@click.option(
    "-o",
    "--out",
    type=click.Path(),
    help=f"""File to write: {", ".join(SUFFIXES)}, or - for stdout; or, if it ends in /, a new folder that transformers
    or timm loads, with a config and a card.""",
)
@model_options
@click.option("--seeds", metavar="LIST", help="Several seeds: 0,3,5 or 0:100, which ends with 99.")
@like_option
@key_option
@click.option(
    "--base",
    type=BaseType(),
    shell_complete=complete_bases,
    metavar="SCHEME",
    default="model",
    help=f"""Draw the convolutions anew before they are decorrelated, as torch.nn.init does by default:
    {", ".join(SCHEMES)}; the first two also with :fan_in or :fan_out, and all with the gain of an activation,
    such as :tanh ({", ".join(ACTIVATIONS)}). Default: model, as they are.""",
)
@click.option(
    "--calibrate",
    callback=_input_shape,
    metavar="CxHxW",
    help="""Then scale every layer to outputs of unit variance on noise of this shape, such as 3x224x224: for
    networks without normalization.""",
)
@click.option(
    "--preset",
    type=click.Choice(PRESETS),
    default="convsim",
    help=f"""Settings to start from: the defaults
    (convsim), or those of the method's published code (paper: --pairs {PAPER.pairs} --norm {PAPER.norm} --steps
    {PAPER.steps}, Adam).""",
)
@click.option("--pairs", type=click.Choice(PAIRS), help=f"Filter pairs that count. Default: {DEFAULTS.pairs}.")
@click.option(
    "--channels",
    type=click.Choice(CHANNELS_CHOICES),
    help=f"""Kernels compared: those of the same input channel (matched), or all with all; auto takes all where
    no normalization follows a layer. Default: {DEFAULTS.channels}.""",
)
@click.option("--norm", type=click.Choice(NORMS), help=f"The filters' L2 norms. Default: {DEFAULTS.norm}.")
@click.option("--steps", type=Whole(min=1), metavar="N", help=f"Most steps per layer. Default: {DEFAULTS.steps}.")
@click.option(
    "--include",
    multiple=True,
    shell_complete=complete_layers,
    metavar="GLOB",
    help="Treat only layers whose name matches. Repeatable.",
)
@click.option(
    "--exclude",
    multiple=True,
    shell_complete=complete_layers,
    metavar="GLOB",
    help="Leave layers alone whose name matches. Repeatable.",
)
@click.option(
    "--device",
    default="auto",
    metavar="NAME",
    help="Where to compute: cpu, cuda, cuda:N, mps, or auto: the CPU. Default: auto.",
)
@click.option("--convs-only", is_flag=True, help="Write only the changed convolutions. Many loaders refuse that.")
@click.option(
    "--head",
    type=click.Choice(HEADS),
    default="keep",
    help="""drop leaves the classifier out of the file, for another
    number of classes. Default: keep.""",
)
@click.option("--without", multiple=True, metavar="GLOB", help="Leave out of the file entries whose key matches.")
@click.option("--prefix", metavar="TEXT", help="Put before every key, for instance 'model.'.")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    metavar="NAME",
    help=f"Dtype of the written floats: {', '.join(DTYPES)}. Default: {DTYPES[0]}.",
)
@click.option(
    "--report",
    "record",
    type=click.Path(path_type=Path),
    help="Write the run's full record, .json, or a page of it, .html.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    help="Draw what it did: .png, .svg, .pdf; dark if its name ends in -dark.",
)
@click.option(
    "--plot-layer",
    metavar="NAME",
    shell_complete=complete_layers,
    help="Layer whose feature maps are drawn. Default: the most changed.",
)
@click.option("--force", is_flag=True, help="Overwrite existing files. Without it several runs keep them.")
@click.option("--dry-run", is_flag=True, help="Show which layers would be treated; compute and write nothing.")
@click.option(
    "--json", "as_json", is_flag=True, callback=needs_stdout, help="Print the result as JSON; of several, a line each."
)
@click.option("-q", "--quiet", is_flag=True, help="No table and no progress bar.")
@click.option("-v", "--verbose", is_flag=True, help="Tell what was read, what computes, and of each layer, on stderr.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def init(
    ctx: click.Context,
    /,
    models: tuple[str, ...],
    out: str | None,
    how: ModelOptions,
    seeds: str | None,
    like: str | None,
    key: str | None,
    base: str,
    calibrate: tuple[int, ...] | None,
    preset: Preset,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    device: str,
    convs_only: bool,
    head: str,
    without: tuple[str, ...],
    prefix: str | None,
    dtype: str | None,
    record: Path | None,
    plot: Path | None,
    plot_layer: str | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    debug: bool,
    **choices: Any,
) -> None:
    """Run the main command; what can be refused without torch is refused before it is loaded."""
    chosen = {name: value for name, value in choices.items() if value is not None}
    settings = replace(Settings.preset(preset), **chosen)
    _check_no_command(ctx, models)
    check_sources(models, how, like, drawn=base != "model")
    check_device_name(device)
    if plot_layer is not None and plot is None and is_by_hand("plot_layer"):
        raise click.UsageError("--plot-layer: nothing is drawn without --plot")
    forced = force and record is None and plot is None
    of_entries = ("convs_only", "head", "without", "prefix", "dtype")
    useless = [f"--{name.replace('_', '-')}" for name in of_entries if is_by_hand(name)]
    useless += ["--force"] if forced and is_by_hand("force") else []
    if out is None and useless:
        raise click.UsageError(f"{', '.join(useless)}: nothing is written without --out")
    if is_by_hand("seed") != is_by_hand("seeds"):  # that one counts, whatever a file has for the other
        how, seeds = (how, None) if is_by_hand("seed") else (replace(how, seed=None), seeds)
        del ctx.params["seeds" if is_by_hand("seed") else "seed"]
    starts = _starts(models, how, seeds, drawn=base != "model")
    folder = out is not None and out.endswith(("/", os.sep))
    if folder:
        _check_whole(
            {"--convs-only": convs_only, "--head drop": head == "drop", "--without": without, "--prefix": prefix}
        )
    to_stdout = out == str(STDOUT)
    if out is not None and Path(out) == STDOUT and not (to_stdout or folder):  # ./- is a file
        check_target(out)
    runs = plan_runs(starts, {"out": None if out is None else Path(out), "record": record, "plot": plot})
    alone = len(models) == 1 and seeds is None
    if to_stdout and (as_json or not alone):
        raise click.UsageError("--out -: expected one run and no --json, which goes to stdout too: name a file")
    launch = launched()
    for run in runs if launch.on_first_machine else ():
        for kind, path in run.files.items():
            if not folder or kind != "out":
                TARGETS[kind](path, overwrite=force or not alone)
            elif alone or force or not path.exists():  # what is there of several is kept
                check_new_folder(path, overwrite=force)

    options = Choices(
        settings=settings,
        how=how,
        like=like,
        key=key,
        base=base,
        calibrate=calibrate,
        include=include,
        exclude=exclude,
        device=device,
        convs_only=convs_only,
        writes=out is not None,
        folder=folder,
        head=head,
        without=without,
        prefix=prefix or "",
        dtype=dtype or DTYPES[0],
        plot_layer=plot_layer,
        force=force,
        dry_run=dry_run,
        origins=tuple(origins(ctx)),
    )
    if dry_run and not launch.leads:
        return
    progress = launch.leads and not quiet and sys.stderr is not None and sys.stderr.isatty()
    if verbose:
        with exit_on_signal():
            environment = describe_environment()
        tell(*options.origins, ", ".join(f"{name} {environment[name]}" for name in ("torch", "step", "threads")))
    if quiet and not (as_json or dry_run or runs[0].files):
        tell("nothing is kept: --out, --report and --plot name files")
    with _meeting(launch, device, wanted=not dry_run) as ranks:
        if not alone:
            sweep(runs, options, ranks, as_json=as_json, quiet=quiet, verbose=verbose, progress=progress, debug=debug)
            return
        run = runs[0] if launch.leads else Run(runs[0].model, runs[0].seed)
        result = write(make(run, options, progress=progress, group=ranks.group if ranks else None), options)
        assert result.report is not None
        if verbose:
            tell(*notes(result.report))
        if as_json:
            show_json(run_record(result.report))
        elif not quiet:
            show_table(result.report.table, err=to_stdout)
        elif UNTREATED in result.report.remarks and result.error is None:
            tell(UNTREATED)
        if result.error is not None:
            raise RunError(result.error)


@contextmanager
def _meeting(launch: Launch, device: str, *, wanted: bool) -> Iterator[Ranks | None]:
    """The processes that torchrun started, if they are to work together; else None, without torch."""
    if launch.size == 1 or not wanted:
        yield None
        return
    with exit_on_signal():
        from convsim_init.parallel.processes import process_group

    find_device(device)  # a rank that has none is refused before it meets the others
    with process_group(launch) as ranks:
        yield ranks


def _check_no_command(ctx: click.Context, models: Sequence[str]) -> None:
    """Refuse what is a command, or may be one mistyped and is no model."""
    group = ctx.parent.command if ctx.parent else None
    commands = group.commands if isinstance(group, click.Group) else {}
    for model in models:
        if model in commands:
            raise click.UsageError(f"{model!r} is a command, not a model: write it before all options")
    first = models[0]
    hint = did_you_mean(first, commands)
    if hint and parse(first).source is Source.ANY:
        try:
            check_found([first], None)
        except UnknownModelError as error:
            raise click.UsageError(f"{first!r} is neither a command nor a model{hint}") from error


def _check_whole(options: Mapping[str, object]) -> None:
    """Refuse options that leave out or rename entries of a folder, which from_pretrained would then draw at random."""
    given = [option for option, value in options.items() if value]
    if given:
        advice = "--num-classes N builds another classifier" if "--head drop" in given else "name a file for less"
        raise click.UsageError(f"{', '.join(given)}: expected a folder of all weights, for from_pretrained: {advice}")


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
