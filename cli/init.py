"""The main command: build a model, decorrelate it, write it, and show what happened."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from convsim_init.devices import check_device_name, find_device
from convsim_init.errors import RunError
from convsim_init.files import SUFFIXES, check_target
from convsim_init.plots import check_plot, choose_layer, figure_of_run, save_figure
from convsim_init.record import SUFFIXES as RECORD_SUFFIXES
from convsim_init.record import save_record
from convsim_init.report import LayerReport, Outcome
from convsim_init.settings import BASES, CHANNELS, NORMS, PAIRS, PRESETS, Base, Preset, Settings

from .ending import ending_at_once
from .source import ModelOptions, Whole, check_sources, like_option, load, model_options

DTYPES = ("float32", "float16", "bfloat16", "float64")
DEFAULTS, PAPER = Settings(), Settings.paper()

HELP = """
Write a checkpoint of decorrelated weights, ready to train from.

MODEL is a name (see `convsim-init list`), torchvision:NAME, timm:NAME, or a function of your own that returns a model:
package.module:function or path/to/file.py:function. Its convolutions are drawn as usual; then every layer's filters are
moved, without changing their norms, until their Convolutional Similarity (arXiv 2411.03226) is low. Or start from the
weights in a FILE (.safetensors, .pt, .pth). What is written is an ordinary full state dict. Without --out nothing is
written: the table alone shows what would be gained.
"""
EPILOG = """\b
Examples:
  convsim-init resnet18 --out init.safetensors
  convsim-init resnet50 --num-classes 10 --seed 3 --out r50.pt
  convsim-init timm:convnext_atto --model-arg drop_path_rate=0.1
  convsim-init weights.pt --like timm:regnety_002 --out init.safetensors
  convsim-init cifar_resnet18 --exclude conv1 --steps 50 --out init.safetensors
  convsim-init resnet18 --preset paper --steps 200 --json
"""


class MainCommand(click.Command):
    """A command that is run by its group's name alone, and so shares the group's help."""

    def get_help(self, ctx: click.Context) -> str:
        """The group's help, which shows this command's options."""
        return ctx.parent.get_help() if ctx.parent else super().get_help(ctx)


@click.command(cls=MainCommand, help=HELP, epilog=EPILOG, hidden=True)
@click.argument("model", metavar="MODEL|FILE")
@click.option("-o", "--out", type=click.Path(path_type=Path), help=f"File to write: {', '.join(SUFFIXES)}.")
@model_options
@like_option
@click.option(
    "--base",
    type=click.Choice(BASES),
    default="model",
    help="""Draw the convolutions anew before they are decorrelated, as torch.nn.init does by default. Default: model,
    as they are.""",
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
    type=click.Choice(CHANNELS),
    help=f"""Kernels compared: those of the same input channel, or
    all with all. Default: {DEFAULTS.channels}.""",
)
@click.option("--norm", type=click.Choice(NORMS), help=f"The filters' L2 norms. Default: {DEFAULTS.norm}.")
@click.option("--steps", type=Whole(min=1), metavar="N", help=f"Most steps per layer. Default: {DEFAULTS.steps}.")
@click.option("--include", multiple=True, metavar="GLOB", help="Treat only layers whose name matches. Repeatable.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Leave layers alone whose name matches. Repeatable.")
@click.option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps. Default: auto.")
@click.option("--convs-only", is_flag=True, help="Write only the changed convolutions. Many loaders refuse that.")
@click.option("--prefix", metavar="TEXT", help="Put before every key, for instance 'model.'.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of the written floats. Default: float32.")
@click.option("--report", "record", type=click.Path(path_type=Path), help="Write the run's full record: .json.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw what it did: .png, .svg, .pdf.")
@click.option("--plot-layer", metavar="NAME", help="Layer whose feature maps are drawn. Default: the most changed.")
@click.option("--force", is_flag=True, help="Overwrite existing files.")
@click.option("--dry-run", is_flag=True, help="Show which layers would be treated; compute and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No table and no progress bar.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
@click.pass_context
def init(
    ctx: click.Context,
    /,
    model: str,
    out: Path | None,
    how: ModelOptions,
    like: str | None,
    base: Base,
    preset: Preset,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    device: str,
    convs_only: bool,
    prefix: str | None,
    dtype: str | None,
    record: Path | None,
    plot: Path | None,
    plot_layer: str | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **choices: Any,
) -> None:
    """Run the main command; what can be refused without torch is refused before it is loaded."""
    chosen = {name: value for name, value in choices.items() if value is not None}
    settings = replace(Settings.preset(preset), **chosen)
    _check_command(ctx, model)
    check_sources([model], how, like, drawn=base != "model")
    check_device_name(device)
    if plot_layer is not None and plot is None:
        raise click.UsageError("--plot-layer: nothing is drawn without --plot")
    if record is not None:
        check_target(record, overwrite=force, suffixes=RECORD_SUFFIXES)
    if plot is not None:
        check_plot(plot, overwrite=force)
    forced = force and record is None and plot is None
    file_options = {"--convs-only": convs_only, "--prefix": prefix, "--dtype": dtype, "--force": forced}
    target = _check_out(out, [option for option, value in file_options.items() if value], force)

    with ending_at_once():
        import torch

        from convsim_init.base import draw_base_
        from convsim_init.checkpoint import save_checkpoint
        from convsim_init.initialize import initialize_, plan
        from convsim_init.snapshot import take_snapshot

    place = find_device(device)
    start = load(model, how, like)
    network, seed = start.content, start.seed
    if dry_run:
        report = plan(network, settings=settings, include=include, exclude=exclude)
    else:
        if base != "model":
            seed = how.seed or 0
            draw_base_(network, base, seed=seed, include=include, exclude=exclude)
        before = None if record is None and plot is None else take_snapshot("before", network, copy=True)
        if before is not None and plot_layer is not None:
            choose_layer([before], plot_layer)
        progress = not quiet and sys.stderr is not None and sys.stderr.isatty()
        report = initialize_(
            network, settings=settings, include=include, exclude=exclude, device=place, progress=progress
        )
        if before is not None:
            after = take_snapshot("after", network)
            report = report.with_measures(before.report, after.report)
    report.model, report.seed, report.base = start.name, seed, base
    report.remarks += start.remarks
    failed = [layer for layer in report.layers if layer.outcome is Outcome.FAILED]
    if target is not None and not dry_run and not failed:
        save_checkpoint(
            network,
            target,
            report=report,
            prefix=prefix or "",
            convs_only=convs_only,
            dtype=getattr(torch, dtype or "float32"),
            overwrite=force,
        )
        report.file, report.file_bytes = str(target), target.stat().st_size
    if not dry_run and not failed:
        if record is not None:
            save_record(report, record, overwrite=force)
        if plot is not None and before is not None:
            save_figure(figure_of_run(report, before, after, layer=plot_layer), plot, overwrite=force)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    elif not quiet:
        click.echo(str(report))
    if failed:
        raise RunError(_failure(failed))


def _check_command(ctx: click.Context, model: str) -> None:
    group = ctx.parent.command if ctx.parent else None
    if isinstance(group, click.Group) and model in group.commands:
        raise click.UsageError(f"{model!r} is a command, not a model: write it before all options")


def _check_out(out: Path | None, file_options: list[str], force: bool) -> Path | None:
    if out is not None:
        return check_target(out, overwrite=force)
    if file_options:
        raise click.UsageError(f"{', '.join(file_options)}: nothing is written without --out")
    return None


def _failure(failed: list[LayerReport]) -> str:
    first, others = failed[0], len(failed) - 1
    more = f" and {others} more" if others else ""
    return f"{first.name}{more} failed, {first.reason}; nothing was written; --exclude leaves a layer alone"
