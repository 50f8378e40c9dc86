"""Runs of the training benchmark in a CSV file, a row each: what was trained is never trained again."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import convsim_init as ci

COLUMNS = ["task", "network", "width", "draw", "optimizer", "steps"]
COLUMNS += ["arm", "rate", "seed", "final", "seconds", "curve"]


@dataclass(frozen=True, order=True)
class Case:
    """What is trained, apart from the arm.

    Attributes:
        draw: The base draw's fan, ``fan_out`` or ``fan_in``.
        optimizer: A name in `fit.OPTIMIZERS`.
    """

    task: str
    network: str
    width: float
    draw: str
    optimizer: str
    steps: int

    def __str__(self) -> str:
        return f"{self.task}, {self.network}, width {self.width:g}, {self.draw}, {self.optimizer}, {self.steps} steps"

    @property
    def file_name(self) -> str:
        """The case as the name of a file."""
        return f"{self.task}-{self.network}-w{self.width:g}-{self.draw}-{self.optimizer}-{self.steps}"


@dataclass(frozen=True)
class Record:
    """A run.

    Attributes:
        final: Whether it is of the final round: its seeds tuned nothing.
        curve: Test accuracy, from 0 to 1, at the points that `fit.points` names.
        seconds: It took.
    """

    case: Case
    arm: str
    rate: float
    seed: int
    final: bool
    curve: tuple[float, ...]
    seconds: float

    @property
    def accuracy(self) -> float:
        """At the end."""
        return self.curve[-1]


class Records:
    """The runs in a file, and a place for more.

    Args:
        path: Of a CSV file, made if there is none. What a killed run left of a row is removed.

    Raises:
        ci.InputError: If the file has other columns.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[tuple[Case, str, float, int], Record] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        path.write_text(whole or ",".join(COLUMNS) + "\n")
        rows = csv.DictReader(whole.splitlines())
        if rows.fieldnames not in (None, COLUMNS):
            raise ci.InputError(f"expected {path} to have the columns {', '.join(COLUMNS)}; move it away")
        for row in rows:
            self._keep(_record(row))

    def __iter__(self) -> Iterator[Record]:
        return iter(self._known.values())

    def find(self, case: Case, arm: str, rate: float, seed: int) -> Record | None:
        """The run, if it has been made."""
        return self._known.get((case, arm, rate, seed))

    def add(self, record: Record) -> None:
        """Keep a run, on disk too."""
        case = record.case
        with self._path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow([
                *(case.task, case.network, f"{case.width:g}", case.draw, case.optimizer, case.steps),
                *(record.arm, f"{record.rate:g}", record.seed, int(record.final), f"{record.seconds:.2f}"),
                " ".join(f"{value:.5g}" for value in record.curve),
            ])  # fmt: skip
        self._keep(record)

    def _keep(self, record: Record) -> None:
        self._known[record.case, record.arm, record.rate, record.seed] = record


def _record(row: dict[str, str]) -> Record:
    case = Case(row["task"], row["network"], float(row["width"]), row["draw"], row["optimizer"], int(row["steps"]))
    curve = tuple(map(float, row["curve"].split()))
    return Record(
        case, row["arm"], float(row["rate"]), int(row["seed"]), row["final"] == "1", curve, float(row["seconds"])
    )
