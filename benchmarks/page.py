"""A page of results in Markdown."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path

from convsim_init.devices import describe_environment

RESULTS = Path(__file__).parent / "results"


class Page:
    """Lines that are printed as they come, and can be written to a file: a title, how it was made, and where."""

    def __init__(self, title: str, made: str, **where: str) -> None:
        self._lines: list[str] = []
        environment = describe_environment() | where
        self.add(f"# {title}, {datetime.date.today()}", "", made, "")
        self.add(*(f"- {name}: {value}" for name, value in environment.items()))

    def add(self, *lines: str) -> None:
        """Add lines, ``""`` between paragraphs."""
        self._lines += lines
        print(*lines, sep="\n", flush=True)

    def head(self, columns: Sequence[str]) -> None:
        """Begin a table with these headings."""
        self.add("", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|")

    def rows(self, rows: Iterable[Iterable[str]]) -> None:
        """Add rows to it, each as soon as it is there."""
        for row in rows:
            self.add("| " + " | ".join(row) + " |")

    def write(self, path: Path) -> None:
        """Write all that was added."""
        path.write_text("\n".join(self._lines) + "\n", encoding="utf-8")
