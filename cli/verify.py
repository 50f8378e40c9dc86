"""The subcommand ``verify``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from convsim_init.files import check_source
from convsim_init.models import build_model, catalog

from .ending import DONE, MISMATCH, ending_at_once
from .init import Whole

HELP = """
Check that a file loads into a model strictly, every key accounted for.

FILE is a checkpoint (.safetensors, .pt, .pth); MODEL is the name of a built-in model. Exit status: 0 if each tensor of
the model is in the file under its own key, in its shape and kind of dtype, finite, and nothing else is; 3 if not, with
what differs.
"""
EPILOG = """\b
Examples:
  convsim-init verify init.safetensors resnet18
  convsim-init verify c100.pt cifar_resnet18 --num-classes 100 --json
"""


@click.command(help=HELP, epilog=EPILOG, short_help="Check that a file loads into a model strictly.")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("model")
@click.option("--num-classes", type=Whole(min=1), metavar="N", help="Outputs of the classifier. Default: the model's.")
@click.option("--in-chans", type=Whole(min=1), metavar="N", help="Channels of the input. Default: 3.")
@click.option("--json", "as_json", is_flag=True, help="Print every key's match as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing: the exit status tells.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
def verify(file: Path, model: str, num_classes: int | None, in_chans: int | None, as_json: bool, quiet: bool) -> int:
    """Run the subcommand; what can be refused without torch is refused before it is loaded."""
    check_source(file)
    catalog.find(model)

    with ending_at_once():
        from convsim_init.loading import verify_checkpoint

    network = build_model(model, num_classes=num_classes, in_chans=in_chans)
    report = verify_checkpoint(network, file, name=model)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    elif not quiet:
        click.echo(f"{'ok' if report.exact else 'mismatch'}: {report}")
    return DONE if report.exact else MISMATCH
