"""The subcommand ``compare``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import click

from convsim_init.errors import InputError
from convsim_init.plotting.figure import figure_of, is_dark, save_figure
from convsim_init.report.text import PATH, shown

from .. import options
from ..completion import complete_models
from ..signals import exit_on_signal
from ..sources import Loaded, ModelOptions, check_sources, is_file, load
from ..terminal import show_json, show_table, stdout_for_results

EPILOG = """\b
Examples:
  convsim-init compare resnet18 init.safetensors
  convsim-init compare before.pt after.pt --plot change.png
"""


@click.command(epilog=EPILOG, short_help="Show models or checkpoints side by side.")
@click.argument("specs", metavar="A B [C]...", nargs=-1, shell_complete=complete_models)
@options.model_options
@options.like_option
@options.key_option
@options.json_option(help="Print the comparison as JSON.")
@options.plot_option(help="Picture to draw: .png, .svg, .pdf; dark if its name ends in -dark.")
@options.plot_layer_option(help="Layer whose feature maps it shows. Default: the most different.")
@options.force_option
def compare(
    specs: tuple[str, ...],
    how: ModelOptions,
    as_json: bool,
    plot: Path | None,
    plot_layer: str | None,
    force: bool,
) -> None:
    """Show models or checkpoints side by side: their measures layer by layer, and their differences.

    A, B and so on are checkpoints (.safetensors, .pt, .pth, .ckpt and the like) or MODELs as `convsim-init --help`
    describes them; the options for a MODEL apply to each of them. A checkpoint that loads into one of the MODELs is
    read as its weights. `convsim-init inspect --help` explains the measures.
    """
    if len(specs) < 2:
        raise click.UsageError("expected at least two models or checkpoints to compare")
    check_sources(specs, how)
    options.check_picture(plot, force=force)

    with exit_on_signal():
        from convsim_init.metrics import compare as comparison

    with stdout_for_results():
        loaded = _load_all(specs, how)
        compared = comparison.compare([(source.name, source.content) for source in loaded])
    for snapshot, source in zip(compared.snapshots, loaded, strict=True):
        snapshot.report.remarks += source.remarks
    if plot is not None:
        figure = figure_of(
            compared.snapshots, title=" | ".join(source.name for source in loaded), layer=plot_layer, dark=is_dark(plot)
        )
        save_figure(figure, plot, overwrite=force)
    if as_json:
        show_json(compared.to_dict())
    else:
        show_table(compared.table)


def _load_all(specs: Sequence[str], how: ModelOptions) -> list[Loaded]:
    """Load all specs; a file that loads strictly into one of the models becomes that model, which knows its layers."""
    loaded = [load(spec, how) for spec in specs]
    models = [source.built for spec, source in zip(specs, loaded, strict=True) if source.built and not is_file(spec)]
    for index, spec in enumerate(specs):
        for model in models if how.like is None and is_file(spec) else ():
            with suppress(InputError):  # the file does not belong to that model
                loaded[index] = load(spec, replace(how, like=model))
                loaded[index].remarks.append(f"{shown(spec, PATH)} is read as weights of {shown(model, PATH)}")
                break
    return loaded
