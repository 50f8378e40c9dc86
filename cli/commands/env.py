"""The subcommand ``env``."""

from __future__ import annotations

import click

from convsim_init.devices import describe_environment

from ..signals import exit_on_signal
from ..terminal import needs_stdout, show_json


@click.command()
@click.option("--json", "as_json", is_flag=True, callback=needs_stdout, help="Print it as JSON.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
def env(as_json: bool) -> None:
    """Show versions and devices: what a bug report needs."""
    with exit_on_signal():
        import torch  # noqa: F401

    environment = describe_environment()
    if as_json:
        show_json(environment)
        return
    width = max(map(len, environment))
    for name, value in environment.items():
        click.echo(f"{name:{width}}  {value}")
