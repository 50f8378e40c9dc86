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

DTYPES = ("float32", "float16", "bfloat16", "float64")


def _input_shape(value: str) -> tuple[int, ...]:
    """Channels and sizes of an input as a user types them: ``3x224x224``."""
    sizes = value.split("x")
    if len(sizes) < 2 or not all(size.isdecimal() and int(size) for size in sizes):
        raise click.BadParameter(f"expected channels and sizes such as 3x224x224, got {value!r}")
    return tuple(map(int, sizes))


def _checked(check: Callable[[str], object]) -> Callable[[str], str]:
    """The type of a text that a function does not refuse."""

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
        help=f"""File to write: {", ".join(SUFFIXES)}, or - for stdout; or, if it ends in /, a new folder that
        transformers or timm loads, with a config and a card.""",
    ),
    options.model_options,
    click.option("--seeds", metavar="LIST", help="Several seeds: 0,3,5 or 0:100, which ends with 99."),
    options.like_option,
    options.key_option,
    click.option(
        "--base",
        type=_checked(parse_base),
        shell_complete=complete_bases,
        metavar="SCHEME",
        default="model",
        help=f"""Draw the convolutions anew before they are decorrelated, as torch.nn.init does by default:
        {", ".join(SCHEMES)}; the first two also with :fan_in or :fan_out, and all with the gain of an activation,
        such as :tanh ({", ".join(ACTIVATIONS)}). Default: model, as they are.""",
    ),
    click.option(
        "--calibrate",
        type=_input_shape,
        metavar="CxHxW",
        help="""Then scale every layer to outputs of unit variance on noise of this shape, such as 3x224x224: for
        networks without normalization.""",
    ),
    options.settings_options,
    options.device_option(help="Where to compute: cpu, cuda, cuda:N, mps, or auto: the CPU. Default: auto."),
    click.option("--convs-only", is_flag=True, help="Write only the changed convolutions. Many loaders refuse that."),
    click.option(
        "--head",
        type=click.Choice(("keep", "drop")),
        default="keep",
        help="drop leaves the classifier out of the file, for another number of classes. Default: keep.",
    ),
    click.option("--without", multiple=True, metavar="GLOB", help="Leave out of the file entries whose key matches."),
    click.option(
        "--prefix",
        type=_checked(check_prefix),
        default="",
        metavar="TEXT",
        help="Put before every key, for instance 'model.'.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        default=DTYPES[0],
        metavar="NAME",
        help=f"Dtype of the written floats: {', '.join(DTYPES)}. Default: {DTYPES[0]}.",
    ),
    click.option(
        "--report",
        "record",
        type=click.Path(path_type=Path),
        help="Write the run's full record, .json, or a page of it, .html.",
    ),
    options.plot_option(help="Draw what it did: .png, .svg, .pdf; dark if its name ends in -dark."),
    options.plot_layer_option(help="Layer whose feature maps are drawn. Default: the most changed."),
    click.option("--force", is_flag=True, help="Overwrite existing files. Without it several runs keep them."),
    click.option("--dry-run", is_flag=True, help="Show which layers would be treated; compute and write nothing."),
    options.json_option(help="Print the result as JSON; of several, a line each."),
    click.option("-q", "--quiet", is_flag=True, help="No table and no progress bar."),
    click.option(
        "-v", "--verbose", is_flag=True, help="Tell what was read, what computes, and of each layer, on stderr."
    ),
    options.debug_option(),
)


def init_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command these options, in this order in its help."""
    for option in reversed(OPTIONS):
        function = option(function)
    return function
