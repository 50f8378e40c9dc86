"""The subcommand ``run``."""

from __future__ import annotations

import builtins
import runpy
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from importlib.machinery import SourceFileLoader
from os.path import isfile
from pathlib import Path
from pkgutil import get_importer
from types import CodeType, ModuleType

import click

from convsim_init.errors import InputError
from convsim_init.parallel.launch import launched
from convsim_init.report.report import Report
from convsim_init.report.table import report_cells
from convsim_init.report.text import printable, shown, some
from convsim_init.settings import PRESETS, Preset, Settings

from ..options import Whole
from ..signals import DONE, FAILED, INTERRUPTED, exit_on_signal, signals_of_python

HELP = """
Run a training script, and initialize the networks that it builds before it trains them.

SCRIPT is run as by `python SCRIPT ARGUMENTS`, with its own exit status. Every convolution that it draws is treated when
it makes an optimizer of torch.optim; what it loads by load_state_dict, pretrained weights and checkpoints, stays. What
it sets in another way counts as drawn: --exclude it. Lines on stderr tell of each network, and of what was left alone
in it. Processes that the script starts itself are not reached; start it under torchrun instead, as
`torchrun --nproc-per-node 2 -m convsim_init run SCRIPT ARGUMENTS`.
"""
EPILOG = """\b
Examples:
  convsim-init run train.py --epochs 90
  convsim-init run --exclude stem.conv -m package.train --epochs 90
"""


@click.command(
    help=HELP,
    epilog=EPILOG,
    short_help="Run a training script whose networks are initialized.",
    context_settings={"allow_interspersed_args": False},
)
@click.option("-m", "is_module", is_flag=True, help="SCRIPT is the name of a module, as for `python -m`.")
@click.option("--preset", type=click.Choice(PRESETS), default="convsim", help="Settings to start from.")
@click.option("--steps", type=Whole(min=1), metavar="N", help="Most steps per layer.")
@click.option("--include", multiple=True, metavar="GLOB", help="Treat only layers whose name matches. Repeatable.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Leave layers alone whose name matches. Repeatable.")
@click.option("-q", "--quiet", is_flag=True, help="Tell nothing of the networks.")
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(
    script: str,
    arguments: tuple[str, ...],
    is_module: bool,
    preset: Preset,
    steps: int | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    quiet: bool,
) -> int:
    """Run the subcommand."""
    settings = Settings.preset(preset)
    if steps is not None:
        settings = replace(settings, steps=steps)
    path = Path(script).absolute()
    is_archive = not is_module and get_importer(str(path)) is not None  # or a folder, with a `__main__.py`
    if not (is_module or is_archive or isfile(path)):
        raise InputError(f"expected a Python file to run, got {script!r}, which is none: check the path")
    with exit_on_signal():
        from convsim_init.context import initializing
        from convsim_init.models.construction import UnmatchedError

    def tell(report: Report) -> None:
        if not quiet and launched().leads:
            cells = ", ".join(" ".join(cell.split()) for cell in report_cells(report.to_dict()))
            line = f"{shown(report.model or '')}, {len(report.layers)} convolutions: {cells}"
            for text in (line, *_left(report), *report.remarks):
                print(printable(f"convsim-init: {text}"), file=sys.stderr, flush=True)

    reports = list[Report]()
    sys.argv = [script, *arguments]
    is_ours = not getattr(sys.flags, "safe_path", False)  # the first one; else no folder of a script is added
    if is_archive or is_ours:
        sys.path[:is_ours] = [str(path if is_archive else Path.cwd() if is_module else path.resolve().parent)]
    try:
        with (
            signals_of_python(),
            redirect_stdout(sys.__stdout__) if not launched().leads else nullcontext(),
            initializing(settings=settings, include=include, exclude=exclude, on_report=tell) as reports,
        ):
            code, names = _load(script, is_module, is_archive)
            # It stays `__main__` until Python ends, as without `run`: threads and exit handlers may pickle its classes.
            main = sys.modules["__main__"] = ModuleType("__main__")
            vars(main).update(names, __builtins__=builtins)
            exec(code, vars(main))
            sys.exit(DONE)  # so that a network which was not to be trained is not treated at the end
    except (UnmatchedError, SystemExit):
        raise
    except BaseException as error:
        own = error.__traceback__
        while own is not None and own.tb_frame.f_globals.get("__name__") != "__main__":
            last, own = own.tb_frame.f_globals.get("__name__"), own.tb_next
        if isinstance(error, ImportError) and own is None and last == "runpy":  # there is no script
            # Then it is not worth telling that no network was treated.
            quiet = True
            raise InputError(f"expected a script or module to run, got {script!r}: {error}: check the name") from error
        if own is None and is_module:  # in what is imported before it
            own = error.__traceback__
        try:
            sys.excepthook(type(error), error.with_traceback(own), own)  # which the script may have set
        except Exception as wrong:  # in the hook: shown after the error that it was called for
            sys.__excepthook__(type(wrong), wrong, wrong.__traceback__)
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED
    finally:
        if not reports and not quiet and launched().leads:
            print(
                "convsim-init: no network was treated: no convolution of PyTorch was given an optimizer of torch.optim",
                file=sys.stderr,
            )


def _load(script: str, is_module: bool, is_archive: bool) -> tuple[CodeType, dict[str, object]]:
    """The code of the script, and the names that Python gives it."""
    if is_module or is_archive:  # as the debugger of Python does
        if is_archive:
            _, spec, code = runpy._get_main_module_details()  # type: ignore[attr-defined]
        else:
            _, spec, code = runpy._get_module_details(script)  # type: ignore[attr-defined]
            sys.argv[0] = spec.origin
        return code, {"__file__": spec.origin, "__loader__": spec.loader, "__package__": spec.parent, "__spec__": spec}
    path = str(Path(script).absolute())
    loader = SourceFileLoader("__main__", path)
    return loader.source_to_code(loader.get_data(path), path), {"__file__": path, "__loader__": loader}


def _left(report: Report) -> Iterator[str]:
    """Why layers were left alone, with how many of them there are of each reason, the most frequent one first."""
    from convsim_init.models.copies import BEFORE

    others = defaultdict[tuple[str, str, str], list[str]](list)
    for one in report.layers:
        if not one.after:
            # Of a layer that was treated before, the reason ends with its name then.
            reason, before, name = (one.reason or "").partition(BEFORE)
            others[one.outcome.value, reason, before].append(name)
    for (outcome, reason, before), names in sorted(others.items(), key=lambda item: -len(item[1])):
        yield f"{len(names)} {outcome}: {reason}{before}{some(names) if before else ''}"
