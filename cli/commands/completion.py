"""The subcommand ``completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

EPILOG = """\b
Examples:
  eval "$(convsim-init completion bash)"        in ~/.bashrc
  eval "$(convsim-init completion zsh)"         in ~/.zshrc
  convsim-init completion fish > ~/.config/fish/completions/convsim-init.fish
"""


@click.command(epilog=EPILOG, short_help="Print a script that completes commands in a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script that makes SHELL complete options, models and layers."""
    root = ctx.find_root()
    program = root.info_name or ""
    variable = f"_{program.replace('-', '_')}_COMPLETE".upper()
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(root.command, {}, program, variable).source())
