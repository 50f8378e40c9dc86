"""The command ``convsim-init``: which subcommand runs, what an error looks like, and the exit status.

torch is imported by the subcommands that need it, so that ``--help`` and ``list`` answer at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click
from click_default_group import DefaultGroup

from convsim_init.errors import InputError
from convsim_init.version import __version__

from .env import env
from .init import init
from .list import list_models

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130


class MainGroup(DefaultGroup):  # type: ignore[misc]
    """A group whose help shows its default command's arguments and options, then the other commands."""

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the usage of the default command and of the others."""
        formatter.write_usage(ctx.command_path, "MODEL [--out PATH] [OPTIONS]")
        formatter.write_usage(ctx.command_path, "COMMAND [ARGS]...", prefix="   or: ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the default command's options and the other commands."""
        init.format_options(click.Context(init, parent=ctx), formatter)
        others = [(name, command.get_short_help_str(80)) for name, command in self.commands.items() if command != init]
        with formatter.section("Commands"):
            formatter.write_dl(others)


@click.group(
    cls=MainGroup,
    default="init",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help=init.help,
    epilog=init.epilog,
)
@click.version_option(__version__, prog_name="convsim-init")
def cli() -> None:
    """Hold the subcommands."""


cli.add_command(init)
cli.add_command(list_models)
cli.add_command(env)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit with its status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    sys.exit(_run(arguments))


def _run(arguments: Sequence[str]) -> int:
    try:
        status = cli.main(arguments, prog_name="convsim-init", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted; nothing was written", INTERRUPTED)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return WRONG_USAGE
    except click.UsageError as error:
        command = error.ctx.command_path.removesuffix(" init") if error.ctx else "convsim-init"
        return _fail(f"{error.format_message()} (see '{command} --help')", WRONG_USAGE)
    except Exception as error:
        if "--debug" in arguments:
            raise
        if isinstance(error, InputError):
            return _fail(str(error), WRONG_USAGE)
        kind = "" if type(error).__module__.startswith("convsim_init") else f"{type(error).__name__}: "
        return _fail(f"{kind}{error} (--debug shows where)", FAILED)
    return status if isinstance(status, int) else DONE


def _fail(message: str, status: int) -> int:
    click.echo("Error: " + " ".join(message.split()), err=True)
    return status
