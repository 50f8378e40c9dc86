"""What the main command refuses before torch is loaded: its arguments, its options, and the files to write."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import click

from convsim_init.files.sources import SUFFIXES, with_suffix
from convsim_init.files.writing import STDOUT, check_new_folder, check_target
from convsim_init.models.spec import Source, parse
from convsim_init.models.zoo.catalog import UnknownModelError
from convsim_init.plotting.figure import check_plot
from convsim_init.report.html import SUFFIXES as PAGE_SUFFIXES
from convsim_init.report.record import SUFFIXES as RECORD_SUFFIXES
from convsim_init.report.text import did_you_mean

from ..devices import check_device_name
from ..options import UNDRAWN, refuse_given
from ..runs.plan import Run, parse_seeds
from ..runs.run import Choices
from ..sources import check_found, check_sources, is_file

CHECKPOINT_OPTIONS = ["convs_only", "head", "without", "prefix", "dtype"]  # without --out they have no use
# Options for less than all weights under their own keys:
PART_OPTIONS = {"convs_only": "--convs-only", "head": "--head drop", "without": "--without", "prefix": "--prefix"}


def _check_checkpoint(path: Path, *, overwrite: bool) -> Path:
    if path != STDOUT:
        return check_target(path, overwrite=overwrite)
    if sys.stdout is None or sys.stdout.isatty():
        got = "a closed one" if sys.stdout is None else "a terminal"
        raise click.UsageError(f"--out -: expected stdout to go to a file or a program, got {got}: add '> FILE'")
    return path


TARGETS: dict[str, Callable[..., Path]] = {
    "out": _check_checkpoint,
    "record": partial(check_target, suffixes=(*RECORD_SUFFIXES, *PAGE_SUFFIXES)),
    "plot": check_plot,
}


def check_no_command(ctx: click.Context, models: Sequence[str]) -> None:
    """Refuse a model that is a command, or that may be one mistyped and is no model."""
    commands = getattr(ctx.find_root().command, "commands", {})
    for model in models:
        if model in commands:
            raise click.UsageError(f"{model!r} is a command, not a model: write it before all options")
    first = models[0]
    # Looked up only where it may be a command mistyped: to look up a model's name imports torch.
    hint = did_you_mean(first, commands)
    if hint and parse(first).source is Source.ANY:
        try:
            check_found([first], None)
        except UnknownModelError as error:
            raise click.UsageError(f"{first!r} is neither a command nor a model{hint}") from error


def check_options(models: Sequence[str], choices: Choices, *, record: Path | None, plot: Path | None) -> None:
    """Refuse models, files and devices that cannot be, and options that would do nothing."""
    check_sources(models, choices.how, drawn=choices.base != "model")
    check_device_name(choices.device)
    if plot is None:
        refuse_given(["plot_layer"], UNDRAWN)
    if not choices.writes:
        overwriting = ["force"] if record is None and plot is None else []
        refuse_given(CHECKPOINT_OPTIONS + overwriting, "no weights are written without --out")


def plan_starts(models: Sequence[str], seeds: str | None, choices: Choices) -> list[tuple[str, int | None]]:
    """Model and seed of each run; a file has a seed only if weights are drawn anew."""
    fixed = [model for model in models if is_file(model) and choices.base == "model"]
    if seeds is None:
        seed = choices.how.seed or 0
        return [(model, None if model in fixed else seed) for model in models]
    if choices.how.seed is not None:
        raise click.UsageError("--seed and --seeds: choose one")
    if fixed:
        raise click.UsageError(f"--seeds: {fixed[0]!r} has its weights already; --base draws them anew")
    return [(model, seed) for model in models for seed in parse_seeds(seeds)]


def check_out(out: str, choices: Choices) -> None:
    """Refuse a file that is not called like a checkpoint, and a folder for a part of the weights."""
    if not choices.folder and out != str(STDOUT):
        with_suffix(out, SUFFIXES)
    # Entries that a folder lacks, or has under other keys, from_pretrained would draw at random.
    given = [option for name, option in PART_OPTIONS.items() if name in choices.of_files]
    if choices.folder and given:
        advice = "--num-classes N builds another classifier" if "head" in choices.of_files else "name a file for less"
        raise click.UsageError(f"{', '.join(given)}: expected a folder of all weights, for from_pretrained: {advice}")


def check_targets(runs: Sequence[Run], choices: Choices, *, alone: bool) -> None:
    """Refuse files that cannot be written, or that exist; those of several runs are kept if they exist."""
    for run in runs:
        for kind, path in run.files.items():
            if kind != "out" or not choices.folder:
                TARGETS[kind](path, overwrite=choices.force or not alone)
            elif alone or choices.force or not path.exists():
                check_new_folder(path, overwrite=choices.force)
