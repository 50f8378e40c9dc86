"""Many runs of the main command in one process: a line for each as it ends, and what failed at the end."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import click

from convsim_init.errors import InputError, RunError
from convsim_init.results import Result, Status, failures, summary
from convsim_init.runs import Run

from .run import Choices, carry_out, failure


def sweep(runs: Sequence[Run], choices: Choices, *, as_json: bool, quiet: bool, progress: bool, debug: bool) -> None:
    """Do one run after the other, whatever becomes of each, and show the results.

    Raises:
        RunError: If one failed.
    """
    results: list[Result] = []
    width = max(len(run.name) for run in runs)
    show_table = not as_json and not quiet
    with _bar(len(runs), shown=progress) as show:
        try:
            for run in runs:
                result = _result(run, choices, debug)
                results.append(result)
                show(json.dumps(result.to_dict()) if as_json else result.line(width) if show_table else None)
        except KeyboardInterrupt:
            if show_table:
                show(summary(results, len(runs)))
            raise
    if show_table:
        click.echo(summary(results, len(runs)))
    failed = failures(results)
    if failed is not None:
        raise RunError(failed)


def _result(run: Run, choices: Choices, debug: bool) -> Result:
    unfinished = run.unfinished(overwrite=choices.force)
    if run.files.paths and not unfinished.files.paths:
        return Result(run, Status.KEPT)
    try:
        report = carry_out(unfinished, choices, progress=False)
    except Exception as error:
        if debug:
            traceback.print_exc()
        foreseen = isinstance(error, (InputError, RunError))
        why = str(error) if foreseen else f"{type(error).__name__}: {error} (--debug shows where)"
        return Result(unfinished, Status.FAILED, error=" ".join(why.split()))
    error_of_layers = failure(report)
    if error_of_layers is not None:
        return Result(unfinished, Status.FAILED, report, error_of_layers)
    return Result(unfinished, Status.PLANNED if choices.dry_run else Status.DONE, report)


@contextmanager
def _bar(runs: int, *, shown: bool) -> Iterator[Callable[[str | None], None]]:
    """A bar of progress on stderr, and a way to print a line on stdout that also moves it on."""
    if not shown:
        yield lambda line: None if line is None else click.echo(line)
        return
    from tqdm import tqdm

    with tqdm(total=runs, desc="runs", unit="run", leave=False) as bar:

        def show(line: str | None) -> None:
            with tqdm.external_write_mode():
                if line is not None:
                    click.echo(line)
            bar.update()

        yield show
