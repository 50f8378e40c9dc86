"""How text looks on a terminal: colour, the help, tables."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass

import click

from convsim_init.errors import RunError
from convsim_init.parallel.launch import launched
from convsim_init.report.record import json_text
from convsim_init.report.table import Table

SECTIONS = {  # names of the parameters in each section of the main command's help
    "Source": "num_classes in_chans model_args seed seeds like key config",
    "Method": "base calibrate preset pairs channels norm steps include exclude device",
    "Output": "out convs_only head without prefix dtype record plot plot_layer force dry_run",
}
REST = "Display"  # section of all other parameters
UNBROKEN = "‑"  # U+2011, a hyphen that no line is broken after


def colour() -> bool | None:
    """Whether output is coloured, by NO_COLOR and FORCE_COLOR; None, for terminals alone, if neither is set."""
    if os.environ.get("NO_COLOR"):
        return False
    return True if os.environ.get("FORCE_COLOR") else None


def tell(*lines: str) -> None:
    """Print lines on stderr, but only in the first of the processes that torchrun started."""
    # Not by click.echo, which asks a script's own kind of stderr for more than print does. Closed, it is None.
    if launched().leads and sys.stderr is not None:
        print(*lines, sep="\n", file=sys.stderr, flush=True)


def reader_has_left(error: OSError) -> bool:
    """Whether stdout could not be written to because the program that read it, such as ``head``, has ended."""
    if os.name != "nt" or error.errno != errno.EINVAL:
        return error.errno == errno.EPIPE
    try:  # on Windows EINVAL may mean that or something else: a second attempt tells
        sys.stdout.flush()
    except OSError:
        return True
    return False


def needs_stdout(ctx: click.Context, parameter: click.Parameter, value: bool) -> bool:
    """Refuse, before any work, an option that prints its result if stdout is closed."""
    if value and sys.stdout is None:
        raise RunError(f"{parameter.opts[0]}: expected stdout to print to, got a closed one: send it to a file")
    return value


@dataclass
class Invocation:
    """How the command was called; click's contexts share it as their object."""

    is_own_process: bool = False  # rather than a call by other code
    debug: bool = False  # whether the command itself was given --debug, not a script that it runs


def note_debug(ctx: click.Context, parameter: click.Parameter, value: bool) -> bool:
    """Remember --debug from the moment it is parsed: parsing what comes after it may fail."""
    ctx.ensure_object(Invocation).debug |= value
    return value


@contextmanager
def stdout_for_results() -> Iterator[None]:
    """Context, or decorator, that sends to stderr what a model's own code prints."""
    with redirect_stdout(sys.stderr):
        yield


def show_table(table: Table, *, err: bool = False) -> None:
    """Print a table; on a terminal it is cut to the terminal's width, and its header is bold."""
    stream = sys.stderr if err else sys.stdout
    width = shutil.get_terminal_size().columns if stream is not None and stream.isatty() else None
    header, lines = table.text(width).split("\n", 1)
    if launched().leads:  # for what goes to stderr, too
        click.echo(f"{click.style(header, bold=True)}\n{lines}", err=err)


def show_json(data: object) -> None:
    """Print plain data as JSON."""
    click.echo(json_text(data, indent=2))


class Formatter(click.HelpFormatter):
    """Click's formatter, with bold headings and with hyphenated words, such as options, left whole."""

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        """Write a line of usage."""
        super().write_usage(_whole(prog), _whole(args), click.style("Usage: ", bold=True) if prefix is None else prefix)

    def write_heading(self, heading: str) -> None:
        """Write a heading."""
        self.write(f"{'':>{self.current_indent}}{click.style(f'{heading}:', bold=True)}\n")

    def write_text(self, text: str) -> None:
        """Write paragraphs."""
        super().write_text(_whole(text))

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        """Write terms and their meanings."""
        super().write_dl([(first, _whole(second)) for first, second in rows], col_max, col_spacing)

    def getvalue(self) -> str:
        """The text that was written."""
        return super().getvalue().replace(UNBROKEN, "-")


class Context(click.Context):
    """A context whose help is written by `Formatter`."""

    formatter_class = Formatter


def write_options(ctx: click.Context, formatter: click.HelpFormatter, others: Iterable[click.Parameter]) -> None:
    """Write the options of a command, and then `others`, in their sections."""
    parameters = (*ctx.command.get_params(ctx), *others)
    options = [parameter for parameter in parameters if isinstance(parameter, click.Option)]
    sections = {name: title for title, names in SECTIONS.items() for name in names.split()}
    for title in (*SECTIONS, REST):
        records = [option.get_help_record(ctx) for option in options if sections.get(option.name or "", REST) == title]
        with formatter.section(title):
            formatter.write_dl([record for record in records if record])


def _whole(text: str) -> str:
    return text.replace("-", UNBROKEN)
