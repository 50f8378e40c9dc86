"""The census: every architecture of many libraries that fits is built, initialized and checked.

    python -m benchmarks.coverage [PATTERN]... [--largest 60] [--steps 3]

For each model with convolutions: a few steps of `initialize_`; no layer may fail, every skipped one has its reason, the
norms of the filters that are used stay, nothing but the treated layers changes, the forward pass is finite, what it
gives to convolutions is as similar as the report says, computed from outside, and what is written loads strictly and to
the bit into another model. Of models that are larger than 60 million parameters the command's peak memory is measured
as well. A line for each model goes to results/census/LIBRARY.csv as it is done; models that are there already are not
done again. results/census.md sums up.

PATTERN is a shell pattern of names, such as 'timm:convnext*'; '*:' does no model, and sums up. Libraries that are not
installed are left out; the extra [census] has all.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import date
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from benchmarks import machine
from benchmarks.coverage.checks import NoInputError, build, check
from benchmarks.coverage.sources import SOURCES, Architecture

RESULTS = Path(__file__).parents[1] / "results"
FIELDS = [
    *("model", "outcome", "parameters", "layers", "treated", "seen", "largest_similarity_error", "largest_norm_error"),
    *("skipped", "peak_memory", "seconds", "detail"),
]
OUTCOMES = ("passed", "failed", "no convolution", "too large", "not built", "no input")
LARGE = 60e6  # parameters

Row = dict[str, object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", default=["*"])
    parser.add_argument("--largest", type=float, default=60, help="million parameters; larger models are left out")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--again", action="store_true", help="do models that did not pass once more")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows, missing = [], {}
    for library in SOURCES:
        table = RESULTS / "census" / f"{library}.csv"
        done = {str(row["model"]): row for row in read(table)}
        found = find(library, options.patterns)
        if found is not None:
            done = {name: row for name, row in done.items() if name in found}
            missing[library] = len(found.keys() - done.keys())
        pending = [
            one
            for name, one in (found or {}).items()
            if any(fnmatchcase(name, pattern) for pattern in options.patterns)
            if name not in done or to_do_again(done[name], options)
        ]
        for one in tqdm(pending, desc=library, unit="model", disable=not sys.stderr.isatty()):
            missing[library] -= one.name not in done
            done[one.name] = examine(one, options)
            write(table, done.values())
        rows += done.values()
    summarize(rows, missing, options)


def find(library: str, patterns: Sequence[str]) -> dict[str, Architecture] | None:
    """The architectures of a library; None if no pattern asks for it, or it is not installed."""
    if not any(fnmatchcase(library, pattern.partition(":")[0]) for pattern in patterns):
        return None
    try:
        return {one.name: one for one in SOURCES[library]()}
    except ImportError as error:
        print(f"{library} is left out: {error}", file=sys.stderr)
        return None


def to_do_again(row: Row, options: argparse.Namespace) -> bool:
    """Whether a model that is in the table is to be done once more."""
    if row["outcome"] in ("failed", "not built", "no input"):
        return options.again
    return row["outcome"] == "too large" and int(row["parameters"]) <= options.largest * 1e6


def examine(architecture: Architecture, options: argparse.Namespace) -> Row:
    """One line of the table."""
    started = time.perf_counter()
    row: Row = dict.fromkeys(FIELDS, "") | {"model": architecture.name}
    outcome = "not built"
    try:
        row["parameters"], convolves = outline(architecture)
        outcome = "failed"
        if not convolves:
            row["outcome"] = "no convolution"
        elif row["parameters"] > options.largest * 1e6:
            row["outcome"] = "too large"
        else:
            row |= check(architecture, options.steps)
            if row["parameters"] > LARGE:
                row["peak_memory"] = f"{peak_memory(architecture.name, options.steps):.2f}"
    except (Exception, SystemExit) as error:  # whatever a library raises, and machine.run
        outcome = "no input" if isinstance(error, NoInputError) else outcome
        row |= {"outcome": outcome, "detail": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return row | {"seconds": f"{time.perf_counter() - started:.1f}"}


def outline(architecture: Architecture) -> tuple[int, bool]:
    """Number of parameters, and whether there is a convolution; without drawing weights, where a library can do so."""
    try:
        with torch.device("meta"):
            model = (architecture.outline or architecture.build)()
    except Exception:  # models that compute with their weights while they are built
        model = build(architecture)
    convolves = any(
        isinstance(module, nn.modules.conv._ConvNd) or getattr(module, "original_name", "").startswith("Conv")
        for module in model.modules()  # the second in TorchScript
    )
    return sum(parameter.numel() for parameter in model.parameters()), convolves


def peak_memory(spec: str, steps: int) -> float:
    """Peak memory of the command, beyond that of the imports, in multiples of the file that it writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "init.safetensors"
        command = ["-m", "convsim_init", spec, "--steps", str(steps), "--quiet", "--out", str(path)]
        _, peak = machine.run([sys.executable, *command])
        return (peak - import_memory(spec.partition(":")[0])) * 2**20 / path.stat().st_size


@cache
def import_memory(library: str) -> float:
    """Peak memory of importing torch and a library, in MiB."""
    return machine.run([sys.executable, "-c", f"import torch, {library}"])[1]


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def summarize(rows: list[Row], missing: dict[str, int], options: argparse.Namespace) -> None:
    """Print a summary of the tables, and write it to results/census.md."""
    passed = [row for row in rows if row["outcome"] == "passed"]
    lines = [
        "# Census",
        "",
        f"`python -m benchmarks.coverage`, {date.today()}, torch {torch.__version__}, {platform.machine()}, on the "
        f"CPU, {options.steps} steps a layer. Every model is in a table of `benchmarks/results/census/`. "
        "Those that are not built here want more than a configuration of defaults, and those without an input want "
        "arguments that are not known here.",
        "",
        "| library | models | passed | failed | without a convolution | too large | not built | no input | not run |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for library in SOURCES:
        mine = Counter(row["outcome"] for row in rows if str(row["model"]).startswith(f"{library}:"))
        counts = [mine[outcome] for outcome in OUTCOMES]
        total, not_run = sum(counts) + missing.get(library, 0), missing.get(library, "?")
        lines.append(f"| {with_version(library)} | {total} | {' | '.join(map(str, counts))} | {not_run} |")
    layers, treated, seen = (sum(int(row[name]) for row in passed) for name in ("layers", "treated", "seen"))
    lines += [
        "",
        f"{layers} convolutions, {treated} treated. The largest relative change of a filter's norm is "
        f"{largest(passed, 'largest_norm_error'):.1e}.",
        "",
        f"{seen} of those treated were called in a forward pass. What they gave to the convolution has the similarity "
        f"that the report says, by a Fourier transform of this benchmark's own; the largest relative difference is "
        f"{largest(passed, 'largest_similarity_error'):.1e}.",
    ]
    large = [row for row in passed if row["peak_memory"]]
    if large:
        most = max(large, key=lambda row: float(row["peak_memory"]))
        lines += [
            "",
            f"Of {len(large)} models of {min(map(millions, large))} to {max(map(millions, large))} million parameters "
            f"the command's peak memory, beyond that of the imports, was at most {most['peak_memory']} times the model "
            f"({most['model']}).",
        ]
    reasons = Counter[str]()
    for row in passed:
        reasons.update(json.loads(row["skipped"]) if row["skipped"] else {})
    lines += ["", "Skipped:", "", "| layers | reason |", "|---|---|"]
    lines += [f"| {count} | {reason} |" for reason, count in reasons.most_common()]
    remarks = [f"- {row['model']}: {row['detail']}" for row in passed if row["detail"]]
    failures = [f"- {row['model']}: {row['detail']}" for row in rows if row["outcome"] == "failed"]
    lines += ["", "## Remarks", "", *(remarks or ["None."]), "", "## Failures", "", *(failures or ["None."])]
    text = "\n".join(lines) + "\n"
    (RESULTS / "census.md").write_text(text, encoding="utf-8")
    print(text)


def with_version(library: str) -> str:
    try:
        return f"{library} {version(library.removesuffix('-tasks'))}"
    except PackageNotFoundError:
        return library


def largest(rows: list[Row], name: str) -> float:
    return max((float(row[name]) for row in rows), default=0)


def millions(row: Row) -> int:
    return round(int(row["parameters"]) / 1e6)


if __name__ == "__main__":
    main()
