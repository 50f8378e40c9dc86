"""The subcommand ``run``."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout

import click

from convsim_init.errors import InputError
from convsim_init.parallel.launch import launched
from convsim_init.report.report import Report
from convsim_init.report.text import convolutions, printable, shown, some
from convsim_init.settings import Settings

from ..devices import MPS_REMARK, check_device_name, find_device
from ..options import device_option, settings_options
from ..signals import DONE, FAILED, INTERRUPTED, exit_on_signal, signals_of_python
from ..terminal import tell
from .script import Script

EPILOG = """\b
Examples:
  convsim-init run train.py --epochs 90
  convsim-init run --exclude stem.conv -m package.train --epochs 90
"""


@click.command(
    epilog=EPILOG,
    short_help="Run a training script and initialize its networks.",
    context_settings={"allow_interspersed_args": False},
)
@click.option("-m", "is_module", is_flag=True, help="SCRIPT is the name of a module, as for `python -m`.")
@settings_options
@device_option(help="Device to compute on: cpu, cuda, cuda:N, mps, or auto: the CPU. Default: auto.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing about the networks.")
@click.argument("script", shell_complete=click.Path().shell_complete)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, shell_complete=click.Path().shell_complete)
def run(
    script: str,
    arguments: tuple[str, ...],
    is_module: bool,
    settings: Settings,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    device: str,
    quiet: bool,
) -> int:
    """Run a training script, and initialize the networks that it builds before it trains them.

    SCRIPT runs as by `python SCRIPT ARGUMENTS`, with its own exit status. When it makes an optimizer of torch.optim,
    the convolutions whose weights it drew are initialized. Weights that it loads by load_state_dict, such as pretrained
    ones and checkpoints, stay as they are; weights that it sets in another way count as drawn: --exclude those. Lines
    on stderr say what became of each network, and why layers were left alone. Processes that the script starts itself
    are not reached; start it by torchrun instead, as `torchrun --nproc-per-node 2 -m convsim_init run SCRIPT
    ARGUMENTS`.
    """
    check_device_name(device)
    program = Script(script, arguments, is_module=is_module)
    with exit_on_signal():
        from convsim_init.context import initializing
        from convsim_init.parallel.processes import of_several_processes
        from convsim_init.tracking.construction import UnmatchedError

    # Not for auto: a process that has looked for GPUs cannot use them in what it forks.
    place = None if device == "auto" else find_device(device)
    process = os.getpid()

    def show(report: Report) -> None:
        if device == "mps":
            report.remarks.append(MPS_REMARK)
        # A process that was forked is within the context, and treats the same.
        if of_several_processes() and launched().size == 1 and os.getpid() == process and report.totals["after"]:
            report.remarks.append(
                "this is one of several processes that torchrun did not start: those that the script starts are not "
                "treated, and may keep other weights than this one: let torchrun start all"
            )
        if not quiet:
            cells = ", ".join(" ".join(cell.split()) for cell in report.cells)
            line = f"{shown(report.model or '')}, {convolutions(len(report.layers))}: {cells}"
            tell(*(printable(f"convsim-init: {text}") for text in (line, *_left(report), *report.remarks)))

    reports = list[Report]()
    try:
        with (
            signals_of_python(),
            redirect_stdout(sys.__stdout__) if not launched().leads else nullcontext(),
            initializing(settings=settings, include=include, exclude=exclude, device=place, on_report=show) as reports,
        ):
            program.execute()
            sys.exit(DONE)  # leaves the context by an exception, so that untrained networks are not treated
    except (UnmatchedError, SystemExit):
        raise
    except BaseException as error:
        if program.is_missing(error):
            quiet = True  # without a script it goes without saying that no network was treated
            raise InputError(f"expected a script or module to run, got {script!r}: {error}: check the name") from error
        program.show(error)
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED
    finally:
        if not reports and not quiet:
            reason = "no convolution of PyTorch was given an optimizer of torch.optim"
            tell(f"convsim-init: no network was treated: {reason}")


def _left(report: Report) -> Iterator[str]:
    """Lines on why layers were left alone, with the number of layers for each reason, the largest first."""
    twins = defaultdict[tuple[str, str], list[str]](list)
    for layer in report.layers:
        if not layer.after:
            twins[layer.outcome.value, (layer.reason or "").removesuffix(layer.twin)].append(layer.twin)
    for (outcome, reason), names in sorted(twins.items(), key=lambda item: -len(item[1])):
        yield f"{len(names)} {outcome}: {reason}{some(filter(None, names))}"
