"""The main command: build a model, decorrelate it, write it, and show what happened."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from convsim_init.files import SUFFIXES, check_target
from convsim_init.models import catalog
from convsim_init.settings import CHANNELS, NORMS, PAIRS, PRESETS, Settings

from .table import format_report

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16", "float64")
DEFAULTS = Settings()

HELP = """
Write a checkpoint of decorrelated weights, ready to train from.

MODEL is the name of a built-in model (see `convsim-init list`). Its convolutions are drawn as usual; then every
layer's filters are moved, without changing their norms, until their Convolutional Similarity (arXiv 2411.03226) is
low. The file is an ordinary full state dict.
"""
EPILOG = """\b
Examples:
  convsim-init resnet18 --out init.safetensors
  convsim-init resnet50 --num-classes 10 --seed 3 --out r50.pt
  convsim-init cifar_resnet18 --exclude conv1 --steps 50 --out init.safetensors
  convsim-init resnet18 --preset paper --steps 100 --json
"""


@click.command(help=HELP, epilog=EPILOG, hidden=True)
@click.argument("model")
@click.option("-o", "--out", type=click.Path(path_type=Path), help=f"File to write: {', '.join(SUFFIXES)}.")
@click.option("--num-classes", type=int, help="Outputs of the classifier. Default: the model's.")
@click.option("--in-chans", type=int, help="Channels of the input. Default: 3.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the drawn weights.")
@click.option("--preset", type=click.Choice(PRESETS), default="convsim", show_default=True, help="Start from these.")
@click.option("--pairs", type=click.Choice(PAIRS), help=f"Filter pairs that count. Default: {DEFAULTS.pairs}.")
@click.option("--channels", type=click.Choice(CHANNELS), help=f"Kernels compared. Default: {DEFAULTS.channels}.")
@click.option("--norm", type=click.Choice(NORMS), help=f"Of each filter. Default: {DEFAULTS.norm}.")
@click.option("--steps", type=int, help=f"Most steps per layer. Default: {DEFAULTS.steps}; paper: 100.")
@click.option("--include", multiple=True, metavar="GLOB", help="Treat only layers whose name matches. Repeatable.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Leave layers alone whose name matches. Repeatable.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--convs-only", is_flag=True, help="Write only the changed convolutions. Many loaders refuse that.")
@click.option("--prefix", default="", help="Put before every key, for instance 'model.'.")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="Of the written floats.")
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@click.option("--dry-run", is_flag=True, help="Show which layers would be treated; compute and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No table and no progress bar.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
def init(
    model: str,
    out: Path | None,
    num_classes: int | None,
    in_chans: int | None,
    seed: int,
    preset: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    device: str,
    convs_only: bool,
    prefix: str,
    dtype: str,
    force: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **choices: Any,
) -> None:
    """Run the main command; everything that can be refused is refused before torch is loaded."""
    chosen = {name: value for name, value in choices.items() if value is not None}
    settings = replace(Settings.preset(preset), **chosen)  # type: ignore[arg-type]
    catalog.find(model)
    target = None if out is None else check_target(out, overwrite=force)

    import torch

    from convsim_init.checkpoint import save_checkpoint
    from convsim_init.devices import find_device
    from convsim_init.initialize import initialize_, plan
    from convsim_init.models import build_model

    place = find_device(device)
    network = build_model(model, num_classes=num_classes, in_chans=in_chans, seed=seed)
    if dry_run:
        report = plan(network, settings=settings, include=include, exclude=exclude)
    else:
        progress = not quiet and sys.stderr.isatty()
        report = initialize_(
            network, settings=settings, include=include, exclude=exclude, device=place, progress=progress
        )
    report.model, report.seed = model, seed
    if target is not None and not dry_run:
        floats: torch.dtype = getattr(torch, dtype)
        save_checkpoint(
            network, target, report=report, prefix=prefix, convs_only=convs_only, dtype=floats, overwrite=force
        )
        report.file, report.file_bytes = str(target), target.stat().st_size
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    elif not quiet:
        click.echo(format_report(report))
