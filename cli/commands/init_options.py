"""The options of the main command: what each is called, takes and means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from convsim_init.errors import InputError
from convsim_init.files.sources import SUFFIXES
from convsim_init.settings import ACTIVATIONS, SCHEMES, check_prefix, parse_base

from .. import options
from ..completion import complete_bases
from ..config import config_option

DTYPES = ("float32", "float16", "bfloat16", "float64")


def _input_shape(value: str) -> tuple[int, ...]:
    """Channels and sizes of an input as a user types them: ``3x224x224``."""
    sizes = value.split("x")
    if len(sizes) < 2 or not all(size.isdecimal() and int(size) for size in sizes):
        raise click.BadParameter(f"expected channels and sizes such as 3x224x224, got {value!r}")
    return tuple(map(int, sizes))


def _checked(check: Callable[[str], object]) -> Callable[[str], str]:
    """A type for click: texts that this function does not refuse."""

    def convert(value: str) -> str:
        try:
            check(value)
        except InputError as error:
            raise click.BadParameter(str(error)) from error
        return value

    return convert


OPTIONS: tuple[Callable[..., Any], ...] = (
    click.option(
        "-o",
        "--out",
        type=click.Path(),
        help=f"""Checkpoint to write: {", ".join(SUFFIXES)}, or - for stdout; or, if it ends in /, a new folder with a
        config and a model card, which transformers or timm loads.""",
    ),
    options.model_options,
    click.option("--seeds", metavar="LIST", help="A run for each of these seeds: 0,3,5 or 0:100, which ends with 99."),
    options.like_option,
    options.key_option,
    config_option,
    click.option(
        "--base",
        type=_checked(parse_base),
        shell_complete=complete_bases,
        metavar="SCHEME",
        default="model",
        help=f"""First draw the convolutions anew, as torch.nn.init does: {", ".join(SCHEMES)}. The first two may be
        followed by :fan_in or :fan_out, and each by an activation for its gain, such as :tanh
        ({", ".join(ACTIVATIONS)}). Default: model, which keeps the model's own draw.""",
    ),
    click.option(
        "--calibrate",
        type=_input_shape,
        metavar="CxHxW",
        help="""At the end scale every layer so that its outputs have unit variance for noise of this shape, such as
        3x224x224: for networks without normalization.""",
    ),
    options.settings_options,
    options.device_option(help="Device to compute on: cpu, cuda, cuda:N, mps, or auto: the CPU. Default: auto."),
    click.option("--convs-only", is_flag=True, help="Write only changed convolutions. Many loaders refuse such files."),
    click.option(
        "--head",
        type=click.Choice(("keep", "drop")),
        default="keep",
        help="Keep the classifier in the file, or drop it, for another number of classes. Default: keep.",
    ),
    click.option("--without", multiple=True, metavar="GLOB", help="Keys to leave out of the file. Repeatable."),
    click.option(
        "--prefix",
        type=_checked(check_prefix),
        default="",
        metavar="TEXT",
        help="Text to put before every key, such as 'model.'.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        default=DTYPES[0],
        metavar="NAME",
        help=f"Dtype of the floats in the file: {', '.join(DTYPES)}. Default: {DTYPES[0]}.",
    ),
    click.option(
        "--report",
        "record",
        type=click.Path(path_type=Path),
        help="File for the full record of the run: .json, or .html for a page to look at.",
    ),
    options.plot_option(help="Picture of the result: .png, .svg, .pdf; dark if its name ends in -dark."),
    options.plot_layer_option(help="Layer whose feature maps are drawn. Default: the most changed."),
    click.option("--force", is_flag=True, help="Overwrite existing files. Without it, several runs keep them."),
    click.option("--dry-run", is_flag=True, help="Show which layers would be treated; compute and write nothing."),
    options.json_option(help="Print the result as JSON; for several runs, one line each."),
    click.option("-q", "--quiet", is_flag=True, help="Show no table and no progress bar."),
    click.option(
        "-v", "--verbose", is_flag=True, help="Show on stderr what was read, what computes, and each layer's outcome."
    ),
    options.debug_option(),
)


def init_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command these options, which its help shows in this order."""
    for option in reversed(OPTIONS):
        function = option(function)
    return function
