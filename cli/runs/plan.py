"""The runs that a command consists of, and the files that each of them writes. It imports no torch."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

from convsim_init.errors import InputError
from convsim_init.report.text import PATH, shown
from convsim_init.settings import MAX_SEED

from ..sources import is_file

MAX_SEEDS = 100_000  # the most in one command
FIELDS = (("model", "", None), ("seed", "", None))  # allowed in braces, as `Formatter.parse` returns them


@dataclass(frozen=True)
class Run:
    """One model that is initialized."""

    model: str  # its spec, or the name of the file to start from
    seed: int | None = None  # seed of the drawn weights; None if none are drawn
    out: Path | None = None  # checkpoint to write, if any
    record: Path | None = None  # record of the run to write, if any
    plot: Path | None = None  # picture to draw, if any

    @property
    def name(self) -> str:
        """The name of the run in lines for people."""
        model = shown(self.model, PATH)
        return model if self.seed is None else f"{model} seed {self.seed}"

    @property
    def files(self) -> dict[str, Path]:
        """Files to write, by their kind: ``out``, ``record`` and ``plot``."""
        files = {"out": self.out, "record": self.record, "plot": self.plot}
        return {kind: path for kind, path in files.items() if path is not None}


def plan_runs(starts: Iterable[tuple[str, int | None]], files: Mapping[str, Path | None]) -> list[Run]:
    """The runs of a command, one for each model and seed; names of files, by their kind, are patterns for `fill`.

    Raises:
        InputError: If two runs or the names of two files are the same, one of several runs would write a file that a
            run starts from, or a name has wrong braces.
    """
    patterns = {kind: str(path) for kind, path in files.items() if path is not None}
    runs = [
        Run(model, seed, **{kind: Path(fill(text, model=model, seed=seed)) for kind, text in patterns.items()})
        for model, seed in starts
    ]
    _check_apart(runs)
    return runs


def parse_seeds(text: str) -> list[int]:
    """Seeds as a user types them: ``0,3,5``, or ``0:4`` for 0, 1, 2 and 3 as in a slice.

    Raises:
        InputError: If the text is not of that form, a seed is too large or there twice, or there are none or far too
            many.
    """
    seeds: list[int] = []
    for part in text.split(","):
        # The largest seed has 19 digits; for thousands of digits int() raises an error of its own.
        found = re.fullmatch(r"\s*([0-9]{1,19})(?::([0-9]{1,19}))?\s*", part)
        if found is None:
            raise InputError(f"--seeds: expected whole numbers such as 0,3,5 or a range such as 0:100, got {text!r}")
        first, end = int(found[1]), int(found[2] or found[1]) + (found[2] is None)
        if end <= first:
            raise InputError(
                f"--seeds: expected a range that rises, such as 0:100, got {part.strip()!r}: its end is left out"
            )
        if end - 1 > MAX_SEED:
            raise InputError(f"--seeds: expected seeds up to {MAX_SEED}, got {part.strip()!r}: choose smaller ones")
        # Checked before they are listed, because too many may not fit into memory.
        if len(seeds) + end - first > MAX_SEEDS:
            raise InputError(f"--seeds: expected at most {MAX_SEEDS} seeds, got more in {text!r}: use several commands")
        seeds += range(first, end)
    if len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds: expected each seed once, got {text!r}: leave out what is there twice")
    return seeds


def fill(pattern: str, *, model: str, seed: int | None) -> str:
    """The pattern with the run's `file_safe` model in place of ``{model}`` and its seed in place of ``{seed}``.

    Raises:
        InputError: If anything else stands in braces, or ``{seed}`` where no weights are drawn.
    """
    try:
        fields = [field for _, *field in Formatter().parse(pattern) if field[0] is not None]
    except ValueError:
        fields = [[]]
    if not all(tuple(field) in FIELDS for field in fields):
        raise InputError(
            f"expected {{model}} and {{seed}} alone in braces, got {pattern!r}: write {{{{ and }}}} for braces"
        )
    if seed is None and any(field[0] == "seed" for field in fields):
        raise InputError(f"{model!r} has its weights already and no seed: take {{seed}} out of {pattern!r}")
    return pattern.format(model=file_safe(model), seed=seed)


def file_safe(model: str) -> str:
    """A model's spec as part of a file name: ``net-small`` for ``path/to/net.py:small``.

    Of a path it takes the last part without its suffix; of all characters, letters, digits and ``._-``.
    """
    if is_file(model):
        text = Path(model.removesuffix(".tar")).stem  # .pth.tar is one suffix
    else:
        place, colon, name = model.rpartition(":")
        text = f"{Path(place).name.removesuffix('.py')}-{name}" if colon else name
    return re.sub(r"[^\w.-]+", "-", text).strip(".-") or "model"


def _identity(path: str | Path) -> str:
    """The same text for all names of a file: Windows takes A.pt for a.pt."""
    return os.path.normcase(os.path.realpath(path))


def _check_apart(runs: Sequence[Run]) -> None:
    """Refuse equal runs, and files that would replace one another or what a run starts from."""
    (model, _), times = Counter((run.model, run.seed) for run in runs).most_common(1)[0]
    if times > 1:
        raise InputError(f"expected each MODEL once, got {model!r} {times} times: name it once")
    sources = {_identity(run.model) for run in runs if len(runs) > 1 and is_file(run.model)}
    writers: dict[str, tuple[Run, str]] = {}
    for run in runs:
        for kind, path in run.files.items():
            real = _identity(path)
            if real in sources:
                raise InputError(f"expected new files to write, got {str(path)!r}, which a run starts from: rename it")
            other, first = writers.setdefault(real, (run, kind))
            if first != kind:
                raise InputError(f"expected another name for each kind of file, got {str(path)!r} twice: rename one")
            if other is not run:
                alike = file_safe(other.model) == file_safe(run.model)
                advice = "use a command for each" if alike else "put {model} into its name"
                raise InputError(
                    f"expected a file of its own for each run, got {str(path)!r} for {other.name} and for {run.name}: "
                    f"{'put {seed} into its name' if other.model == run.model else advice}"
                )
