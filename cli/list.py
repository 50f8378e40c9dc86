"""The subcommand ``list``."""

from __future__ import annotations

import json

import click

from convsim_init.errors import InputError
from convsim_init.models import catalog


@click.command("list", short_help="List the models that can be built here.")
@click.argument("pattern", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
def list_models(pattern: str | None, as_json: bool) -> None:
    """List the models that can be built here, all of them or those that match PATTERN.

    PATTERN is a shell pattern such as 'resnet*', in quotes so that the shell leaves it alone.
    """
    names = catalog.names(pattern)
    if not names:
        raise InputError(
            f"expected a pattern that a model's name matches, got {pattern!r}; `convsim-init list` shows all"
        )
    if as_json:
        click.echo(json.dumps([{"name": name, "summary": catalog.MODELS[name].summary} for name in names], indent=2))
        return
    width = max(map(len, names))
    for name in names:
        click.echo(f"{name:{width}}  {catalog.MODELS[name].summary}")
