"""The subcommand ``verify``."""

from __future__ import annotations

import click

from convsim_init.files.sources import check_source
from convsim_init.models.libraries import resolve

from ..completion import complete_models
from ..options import json_option, key_option, model_options
from ..signals import DONE, MISMATCH, exit_on_signal
from ..sources import ModelOptions, is_file
from ..terminal import show_json, stdout_for_results

EPILOG = """\b
Examples:
  convsim-init verify init.safetensors resnet18
  convsim-init verify c100.pt cifar_resnet18 --num-classes 100 --json
"""


@click.command(epilog=EPILOG, short_help="Check that a file loads strictly into a model.")
@click.argument("file", type=click.Path())
@click.argument("model", shell_complete=complete_models)
@model_options
@key_option
@json_option(help="Print the match of every key as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing; the exit status tells.")
def verify(file: str, model: str, how: ModelOptions, as_json: bool, quiet: bool) -> int:
    """Check that a file loads strictly into a model, with every key accounted for.

    FILE is a checkpoint (.safetensors, .pt, .pth, .ckpt and the like); `convsim-init --help` says what a MODEL is. Exit
    status: 0 if the model's own strict loading takes the file, which holds each of the model's tensors under its key,
    in its shape and kind of dtype, finite, and nothing else; 3 if not, and the differences are listed.
    """
    if as_json and quiet:
        raise click.UsageError("--json and --quiet: choose one")
    if is_file(model) and not is_file(file):
        raise click.UsageError(f"expected FILE MODEL, got MODEL FILE: write verify {model} {file}")
    check_source(file)
    how.check(model)

    with exit_on_signal():
        from convsim_init.checkpoint.load import verify_checkpoint

    name = resolve(model).text
    with stdout_for_results():
        report = verify_checkpoint(how.build(name), file, name=name, key=how.key)
    if as_json:
        show_json(report.to_dict())
    elif not quiet:
        click.echo(f"{'ok' if report.exact else 'mismatch'}: {report}")
    return DONE if report.exact else MISMATCH
