"""Which runs a command consists of, and which files each of them writes. Imports no torch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from convsim_init.cli.naming import file_safe, fill
from convsim_init.errors import InputError
from convsim_init.files import SUFFIXES


@dataclass(frozen=True)
class Files:
    """What a run writes, or the patterns of what many write; None where nothing is asked for.

    Attributes:
        out: The checkpoint.
        record: The record of the run.
        plot: The picture.
    """

    out: Path | None = None
    record: Path | None = None
    plot: Path | None = None

    @property
    def paths(self) -> list[Path]:
        """Those that are asked for."""
        return [path for path in self._all.values() if path is not None]

    def filled(self, model: str, seed: int | None) -> Files:
        """The files of one run where these are patterns.

        Raises:
            InputError: If one is no pattern; see `convsim_init.cli.naming.fill`.
        """
        named = {name: path and Path(fill(str(path), model=model, seed=seed)) for name, path in self._all.items()}
        return Files(**named)

    def missing(self) -> Files:
        """Those that are not there yet."""
        return Files(**{name: path for name, path in self._all.items() if path and not path.exists()})

    @property
    def _all(self) -> dict[str, Path | None]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Run:
    """One model that is initialized.

    Attributes:
        model: Its spec, or the name of the file to start from.
        seed: Of what is drawn; None if nothing is.
        files: What is written.
    """

    model: str
    seed: int | None
    files: Files

    @property
    def name(self) -> str:
        """What people call it."""
        return self.model if self.seed is None else f"{self.model} seed {self.seed}"

    def unfinished(self, *, overwrite: bool) -> Run:
        """The run with those files alone that it has still to write."""
        return self if overwrite else replace(self, files=self.files.missing())


def plan_runs(starts: Sequence[tuple[str, int | None]], files: Files) -> list[Run]:
    """The runs of a command, in the order given.

    Args:
        starts: Model and seed of each run, as in `Run`.
        files: Patterns of what each writes.

    Raises:
        InputError: If two runs are the same or would write the same file, one would write what a run starts from, or a
            pattern is none.
    """
    runs = [Run(model, seed, files.filled(model, seed)) for model, seed in starts]
    if len(runs) > 1:
        _check_apart(runs)
    return runs


def _check_apart(runs: Sequence[Run]) -> None:
    (model, _), times = Counter((run.model, run.seed) for run in runs).most_common(1)[0]
    if times > 1:
        raise InputError(f"expected each MODEL once, got {model!r} {times} times: name it once")
    sources = {os.path.realpath(run.model) for run in runs if Path(run.model).suffix in SUFFIXES}
    writers: dict[str, Run] = {}
    for run in runs:
        for path in run.files.paths:
            real = os.path.realpath(path)
            if real in sources:
                raise InputError(f"expected new files to write, got {str(path)!r}, which a run starts from: rename it")
            other = writers.setdefault(real, run)
            if other is not run:
                raise InputError(
                    f"expected a file of its own for each run, got {str(path)!r} for {other.name} and for {run.name}: "
                    f"{_advice(other, run)}"
                )


def _advice(one: Run, other: Run) -> str:
    if one.model == other.model:
        return "put {seed} into its name"
    alike = file_safe(one.model) == file_safe(other.model)
    return "use a command for each" if alike else "put {model} into its name"
