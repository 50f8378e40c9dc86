"""The subcommand ``list``."""

from __future__ import annotations

import sys

import click

from convsim_init.errors import InputError
from convsim_init.models import libraries
from convsim_init.models.spec import LIBRARIES
from convsim_init.models.zoo import catalog

from ..options import json_option
from ..signals import exit_on_signal
from ..terminal import show_json

OTHERS = "; ".join(f"convsim-init list '{library.value}:*'" for library in LIBRARIES)


@click.command("list", short_help="List the models that can be built here.")
@click.argument("pattern", required=False)
@json_option(help="Print the list as JSON.")
def list_models(pattern: str | None, as_json: bool) -> None:
    """List the models that can be built here: the built-in ones, or those that match PATTERN.

    PATTERN is a shell pattern such as 'resnet*', 'timm:convnext*' or 'torchvision:*', in quotes so that the shell
    leaves it alone. Without a library in it, it is tried on the built-in models, then on the installed libraries.
    """
    summaries = _matches(pattern)
    if not summaries:
        raise InputError(
            f"expected a pattern that a model's name matches, got {pattern!r}; `convsim-init list` shows the built-in "
            f"ones, `convsim-init list 'timm:*'` and `convsim-init list 'torchvision:*'` those of the libraries"
        )
    if as_json:
        show_json([{"name": name, "summary": text} for name, text in summaries.items()])
        return
    width = max(map(len, summaries))
    click.echo("\n".join(f"{name:{width}}  {text or ''}".rstrip() for name, text in summaries.items()))
    if pattern is None and sys.stderr is not None and sys.stderr.isatty():
        click.echo(f"\nMore models, of the libraries: {OTHERS}", err=True)


def _matches(pattern: str | None) -> dict[str, str | None]:
    """Names of the models that match, with a summary of those that are built in."""
    library = next((library for library in LIBRARIES if pattern and pattern.startswith(f"{library.value}:")), None)
    if library is not None and pattern is not None:
        searched, pattern = [library], pattern.partition(":")[2]
    else:
        names = catalog.names(pattern)
        if names or pattern is None:
            return {name: catalog.MODELS[name].summary for name in names}
        searched = libraries.installed()
    with exit_on_signal():
        return {f"{library.value}:{name}": None for library in searched for name in libraries.names(library, pattern)}
