"""The subcommand ``inspect``."""

from __future__ import annotations

from pathlib import Path

import click

from convsim_init.plotting.figure import figure_of, is_dark, save_figure
from convsim_init.report.record import run_record
from convsim_init.report.table import COLUMNS, as_csv

from .. import options
from ..completion import complete_models
from ..signals import exit_on_signal
from ..sources import ModelOptions, check_sources, load
from ..terminal import needs_stdout, show_json, show_table, stdout_for_results

HELP = """
Measure how redundant the filters of a model are, layer by layer.

FILE is a checkpoint (.safetensors, .pt, .pth, .ckpt, .bin, .th, .pth.tar, or a folder of Hugging Face or of
torch.distributed.checkpoint); `convsim-init --help` says what a MODEL is. A file does not tell which of its
convolutions are grouped or transposed: that is inferred from their shapes, unless --like names the model.

\b
similarity    mean Convolutional Similarity of two filters, independent of
              their scale; it compares kernels of the same input channel,
              also where a run compared all channels
corr-white    mean |correlation| of two feature maps, expected for white noise
corr-natural  the same, expected for images with the spectrum of photographs
rank-natural  effective rank of the feature maps of such images, over their
              number
"""
EPILOG = """\b
Examples:
  convsim-init inspect checkpoint.safetensors --sort corr-natural
  convsim-init inspect resnet50 --include 'layer4.*' --csv
  convsim-init inspect checkpoint.pt --plot filters.png
"""


@click.command(help=HELP, epilog=EPILOG, short_help="Measure how redundant the filters of a model are.")
@click.argument("spec", metavar="FILE|MODEL", shell_complete=complete_models)
@options.model_options
@options.like_option
@options.key_option
@click.option("--sort", type=click.Choice(list(COLUMNS)), help="Order layers by this column, from high to low.")
@options.names_option("--include", help="Show only layers whose names match. Repeatable.")
@options.names_option("--exclude", help="Leave out layers whose names match. Repeatable.")
@options.json_option(help="Print all measures as JSON.")
@click.option("--csv", is_flag=True, callback=needs_stdout, help="Print all measures as comma-separated values.")
@options.plot_option(help="Picture to draw: .png, .svg, .pdf; dark if its name ends in -dark.")
@options.plot_layer_option(help="Layer whose feature maps it shows. Default: the most redundant.")
@options.force_option
def inspect(
    spec: str,
    how: ModelOptions,
    sort: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    as_json: bool,
    csv: bool,
    plot: Path | None,
    plot_layer: str | None,
    force: bool,
) -> None:
    """Run the subcommand; what can be refused without torch is refused before it is loaded."""
    if as_json and csv:
        raise click.UsageError("--json and --csv: choose one")
    check_sources([spec], how)
    options.check_picture(plot, force=force)

    with exit_on_signal():
        from convsim_init.metrics.measure import measure
        from convsim_init.metrics.snapshot import take_snapshot

    with stdout_for_results():
        loaded = load(spec, how, convolutions_only=True)
        if plot is None:
            report = measure(loaded.content).select(include, exclude)
        else:
            snapshot = take_snapshot(loaded.name, loaded.content).select(include, exclude)
            figure = figure_of([snapshot], title=loaded.name, layer=plot_layer, dark=is_dark(plot))
            save_figure(figure, plot, overwrite=force)
            report = snapshot.report
    report.model, report.seed = loaded.name, loaded.seed
    report.remarks += loaded.remarks
    if sort is not None:
        report = report.sorted_by(COLUMNS[sort])
    if as_json:
        show_json(run_record(report))
    elif csv:
        click.echo(as_csv(report.to_records()), nl=False)
    else:
        show_table(report.table)
