"""Many runs in one command: a line for each when it ends, and at the end a summary and the failures."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from convsim_init.errors import InputError, RunError
from convsim_init.files.sources import folder_file
from convsim_init.files.writing import ExistsError
from convsim_init.models.libraries import resolve
from convsim_init.models.spec import CONFIG, Source, parse
from convsim_init.report.record import json_text, read_record
from convsim_init.report.text import PATH, error_line, quoted, shown, some

from ..signals import FAILED, exit_on_signal, fail
from ..sources import check_found, is_file
from ..terminal import reader_has_left, tell
from .plan import Run
from .results import Result, Status, failures, notes, summary
from .run import Choices, make, write

if TYPE_CHECKING:
    from convsim_init.parallel.processes import Ranks


def sweep(runs: Sequence[Run], choices: Choices, ranks: Ranks | None, *, progress: bool) -> None:
    """Do one run after the other, or one in each rank at a time, and show the results.

    Raises:
        InputError: If a model that is to be built is not found; then no run is begun.
        RunError: If a run failed, which does not stop the others, or if a rank has died.
    """
    from tqdm import tqdm

    results: list[Result] = []
    width = max(len(run.name) for run in runs)
    show_table = not (choices.as_json or choices.quiet)
    hidden = choices.verbose or not progress
    with tqdm(total=len(runs), desc="runs", unit="run", leave=False, disable=hidden) as bar:

        def show(line: str | None) -> None:
            with tqdm.external_write_mode():
                if line is not None:
                    click.echo(line)
            bar.update()

        try:
            for result in _results(runs, choices, ranks):
                results.append(result)
                if choices.verbose and result.report is not None:
                    tell(*notes(result.report))
                show(json_text(result.to_dict()) if choices.as_json else result.line(width) if show_table else None)
        except KeyboardInterrupt:
            if show_table:
                show(summary(results, len(runs), folders=choices.folder))
            raise
        except OSError as error:
            if reader_has_left(error):  # click ends the command then, and tells nothing
                fail(f"stdout was closed after {len(results)} of {len(runs)} runs: send it to a file", FAILED)
            raise
    if show_table:
        click.echo(summary(results, len(runs), folders=choices.folder))
    failed = failures(results)
    if failed is not None:
        raise RunError(failed)


def check_kept(runs: Sequence[Run], choices: Choices) -> None:
    """Refuse to keep a file whose record differs from its run, in the model, the seed or any option.

    A line on stderr names the files of runs without any record, and those that are older than the files of the
    weights or the code that their run starts from.

    Raises:
        InputError: If there is such a file.
    """
    silent: list[Path] = []
    older: dict[Path, list[Path]] = {}
    for run in () if choices.force else runs:
        records = {path: read_record(path) for path in run.files.values() if path.exists()}
        for path, record in records.items():
            if differences := _differences(record, run, choices):
                raise InputError(
                    f"expected the files of an earlier run of this command or none, got {str(path)!r}, made with "
                    f"{', '.join(differences)}: choose another name, or write it anew with --force"
                )
        silent += [] if any(record.get("model") for record in records.values()) else records
        for source in _sources(run, choices):
            made = source.stat().st_mtime_ns
            older.setdefault(source, []).extend(path for path in records if path.stat().st_mtime_ns < made)
    kept = {"nothing in them says what made them": silent}
    kept |= {f"{shown(str(source), PATH)} is newer": paths for source, paths in older.items()}
    for why, paths in kept.items():
        if paths:
            names = some(shown(str(path), PATH) for path in paths)
            tell(f"kept, though {why}: {names}; --force writes them anew")


def _sources(run: Run, choices: Choices) -> Iterator[Path]:
    """Files of weights, code and configuration that the run starts from, without those that they import."""
    for spec in filter(None, [run.model, choices.how.like if is_file(run.model) else None]):
        place = spec if is_file(spec) else parse(spec).place
        found = (Path(place), Path(place, CONFIG), folder_file(Path(place))) if place else ()
        yield from (path for path in found if path is not None and path.is_file())


def _differences(record: Mapping[str, Any], run: Run, choices: Choices) -> list[str]:
    """Properties of the recorded run that this run does not share, such as ``seed 3, not 4``."""
    settings, options = record.get("settings"), record.get("options")
    if not isinstance(settings, Mapping):
        return []
    found = {"calibrated": None, **{key: value for key, value in record.items() if value is not None}, **settings}
    wanted = {"model": run.model, "seed": run.seed, "base": choices.base, **asdict(choices.settings)}
    wanted["calibrated"] = choices.calibrate and list(choices.calibrate)
    if choices.settings.channels == "auto":
        del wanted["channels"]  # the record has what it was resolved to
    if _is_model(str(found.get("model", "")), run.model):
        del wanted["model"]
    # An entry that the record lacks counts as equal.
    pairs = [(name, found.get(name, value), value) for name, value in wanted.items()]
    given, asked = options if isinstance(options, Mapping) else {}, choices.of_files  # both without defaults
    pairs += [(name, given.get(name), asked.get(name)) for name in {**asked, **given}]
    return [f"{name} {_value_text(old)}, not {_value_text(new)}" for name, old, new in pairs if old != new]


def _value_text(value: object) -> str:
    return "default" if value is None else quoted(value)


def _is_model(found: str, wanted: str) -> bool:
    """Whether both name the same model or file; a bare name is looked up in the libraries."""
    if found.endswith(f":{wanted}") and not is_file(wanted) and parse(wanted).source is Source.ANY:
        with exit_on_signal():
            wanted = resolve(wanted).text
    return Path(found).absolute() == Path(wanted).absolute()


def _results(runs: Sequence[Run], choices: Choices, ranks: Ranks | None) -> Iterator[Result]:
    """Results of all runs, in their order; in ranks the first one alone has them, and writes the files."""
    pending: list[Run | Result] = []
    for run in runs:
        missing = {kind: path for kind, path in run.files.items() if choices.force or not path.exists()}
        kept = bool(run.files) and not missing
        pending.append(Result(run, Status.KEPT) if kept else Run(run.model, run.seed, **missing))
    if ranks is not None:
        pending = ranks.exchange(pending)[0]  # the first rank says which files exist already
    unfinished = [run for run in pending if isinstance(run, Run)]
    check_found([run.model for run in unfinished], choices.how.like if unfinished else None)
    size, rank = (1, 0) if ranks is None else (ranks.size, ranks.rank)
    for start in range(0, len(pending), size):
        made = None  # frees the weights of the last run before the next one is made
        # This rank's run of this round; in the last round some ranks have none, and send None.
        for item in pending[start : start + size][rank : rank + 1]:
            made = item if isinstance(item, Result) else _attempt(item, partial(make, item, choices), choices)
        results = filter(None, [made] if ranks is None else ranks.gather(made))
        yield from (_attempt(result.run, partial(write, result, choices), choices) for result in results)


def _attempt(run: Run, work: Callable[[], Result], choices: Choices) -> Result:
    try:
        with suppress(ExistsError):
            return work()
        check_kept([run], choices)  # its file exists: another command has written it in the meantime
        return Result(run, Status.KEPT)
    except Exception as error:
        if choices.debug:
            traceback.print_exception(error)
        return Result(run, Status.FAILED, error=" ".join(error_line(error).split()))
