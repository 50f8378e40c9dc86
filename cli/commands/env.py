"""The subcommand ``env``."""

from __future__ import annotations

import click

from convsim_init.devices import describe_environment

from ..options import json_option
from ..signals import exit_on_signal
from ..terminal import show_json


@click.command()
@json_option(help="Print them as JSON.")
def env(as_json: bool) -> None:
    """Show versions and devices, for a bug report."""
    with exit_on_signal():
        import torch  # noqa: F401

    environment = describe_environment()
    if as_json:
        show_json(environment)
        return
    width = max(map(len, environment))
    for name, value in environment.items():
        click.echo(f"{name:{width}}  {value}")
