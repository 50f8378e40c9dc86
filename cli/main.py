"""The command ``convsim-init``: which subcommand runs, how an error looks, the exit status.

torch is imported by the subcommands that need it, so that ``--help`` and ``list`` answer at once.
"""

from __future__ import annotations

import signal

_interrupt = signal.getsignal(signal.SIGINT)
if _interrupt is signal.default_int_handler:  # it would show a traceback of the imports below
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    except ValueError:  # in another thread than the main one, which no signal reaches
        _interrupt = None

import sys
from typing import Any

from .signals import DONE, FAILED, WRONG_USAGE, Terminated, exit_on_signal, fail, grace_period, interrupted

if _interrupt is signal.default_int_handler:
    signal.signal(signal.SIGINT, _interrupt)
with exit_on_signal():  # imports that take long, which a signal is to end without a traceback
    import errno
    import io
    import os
    from collections.abc import Iterator, Sequence
    from contextlib import contextmanager, nullcontext, redirect_stdout
    from itertools import takewhile
    from pathlib import Path

    import click
    from click.shell_completion import CompletionItem
    from click_default_group import DefaultGroup

    from convsim_init.errors import InputError
    from convsim_init.parallel.launch import launched
    from convsim_init.report.text import error_line
    from convsim_init.version import __version__

    from .commands.compare import compare
    from .commands.env import env
    from .commands.init import init
    from .commands.inspect import inspect
    from .commands.list import list_models
    from .commands.run import run
    from .commands.verify import verify
    from .completion import completion
    from .options import debug_option
    from .terminal import Context, Invocation, colour, reader_has_left, write_options

PROGRAM = "convsim-init"
COMPLETE = "_CONVSIM_INIT_COMPLETE"  # variable that a shell's completion sets


class MainGroup(DefaultGroup):  # type: ignore[misc]
    """A group whose help shows its default command's options, then the other commands."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Leave ``--``, where no command stands before it, to the default one."""
        if "--" in takewhile(lambda word: word.startswith("-"), args):
            args.insert(0, self.default_cmd_name)
        return super().parse_args(ctx, args)  # type: ignore[no-any-return]

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the usage of the default command and of the others."""
        formatter.write_usage(ctx.command_path, "MODEL|FILE... [--out PATH] [OPTIONS]")
        formatter.write_usage(ctx.command_path, "COMMAND [ARGS]...", prefix="   or: ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the default command's options and the other commands."""
        version = next(parameter for parameter in self.params if parameter.name == "version")
        write_options(Context(init, info_name=init.name, parent=ctx), formatter, [version])
        others = [(name, command.get_short_help_str(80)) for name, command in self.commands.items() if command != init]
        with formatter.section("Commands"):
            formatter.write_dl(others)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Completions of the first word: models and files, commands, options."""
        default = Context(init, info_name=init.name, parent=ctx)
        models = [] if incomplete.startswith("-") else init.params[0].shell_complete(default, incomplete)
        return [*models, *super().shell_complete(ctx, incomplete), *init.shell_complete(default, incomplete)]

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:  # click itself would print an empty line
            raise click.Abort from error


@click.group(
    cls=MainGroup,
    default="init",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help=init.help,
    epilog=init.epilog,
)
@click.version_option(__version__, "-V", "--version", prog_name=PROGRAM, help="Show the version and exit.")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Before any subcommand, make all names printable and end the processes that have no part in it."""
    stdout, is_own_process = sys.stdout, ctx.ensure_object(Invocation).is_own_process
    # The stdout of other code and of a script that `run` runs stays as it is.
    if is_own_process and ctx.invoked_subcommand != run.name and isinstance(stdout, io.TextIOWrapper):
        stdout.reconfigure(errors="backslashreplace")  # escapes letters that its encoding lacks
    if ctx.invoked_subcommand not in (init.name, run.name) and not launched().leads:
        ctx.exit(DONE)


cli.context_class = Context
for command in (init, run, inspect, compare, verify, list_models, env, completion):
    command.context_class = Context
    cli.add_command(command)
    if command not in (init, completion):  # init has --debug already, and completion does nothing that may fail
        debug_option(expose_value=False)(command)


STDOUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # a full disk and the like


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit with its status."""
    try:
        # With arguments it was called by other code, which wants its signals back afterwards, and what `run` changes.
        is_own_process = arguments is None
        with grace_period(last=is_own_process), nullcontext() if is_own_process else restored(), showing_once():
            status = _run(sys.argv[1:] if arguments is None else list(arguments), is_own_process=is_own_process)
    except (KeyboardInterrupt, click.Abort) as error:
        # MainGroup turns an interrupt into Abort, whose cause says which signal it was.
        status = interrupted(terminated=isinstance(error.__cause__ or error, Terminated))
    sys.exit(status)


@contextmanager
def restored() -> Iterator[None]:
    """Put back what `run` changes for its script, and stdout, which is dropped when its reader has left."""
    before = sys.argv, sys.path[:], sys.modules["__main__"], sys.excepthook, sys.stdout
    try:
        yield
    finally:
        sys.argv, sys.path[:], sys.modules["__main__"], sys.excepthook, sys.stdout = before


@contextmanager
def showing_once() -> Iterator[None]:
    """Drop what processes print on stdout, but for the first of those that torchrun started."""
    if launched().leads:
        yield
        return
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        yield


def _run(arguments: Sequence[str], *, is_own_process: bool) -> int:
    invocation = Invocation(is_own_process)
    try:
        if not arguments and COMPLETE not in os.environ:  # versions of click differ in what they do then
            if launched().reports_errors:
                ctx = cli.make_context(PROGRAM, [], resilient_parsing=True)
                click.echo(cli.get_help(ctx), err=True, color=colour())
            return WRONG_USAGE
        # In its standalone mode click would end the process itself, with statuses of its own.
        status = cli.main(arguments, PROGRAM, standalone_mode=False, color=colour(), obj=invocation)
        return status if isinstance(status, int) else DONE
    except click.Abort:  # a RuntimeError, which is not to be reported below
        raise
    except click.UsageError as error:
        # The name of the main command is not typed.
        command = error.ctx.command_path.removesuffix(" init") if error.ctx else PROGRAM
        return fail(f"{error.format_message().rstrip('.')} (see '{command} --help')", WRONG_USAGE)
    except Exception as error:
        if isinstance(error, OSError) and reader_has_left(error):  # on Windows; elsewhere click sees to it
            sys.stdout = None  # or Python would report that it cannot be flushed
            return FAILED
        if invocation.debug:  # in each process, for one alone may have raised it
            import traceback

            click.echo(traceback.format_exc(), err=True, nl=False)
        if isinstance(error, OSError) and error.errno in STDOUT_ERRORS:  # errors of files are RunErrors
            return fail(f"could not write to stdout: {error.strerror}; send it elsewhere", FAILED)
        return fail(error_line(error), WRONG_USAGE if isinstance(error, InputError) else FAILED)
