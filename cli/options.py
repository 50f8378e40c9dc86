"""Options that several commands have, and checks of options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

import click

from convsim_init.plotting.figure import check_plot
from convsim_init.settings import CHANNELS_CHOICES, MAX_SEED, NORMS, PAIRS, PRESETS, Preset, Settings

from .arguments import OWN_OPTIONS, parse_arguments
from .completion import complete_layers, complete_models
from .config import is_by_hand
from .sources import ModelOptions
from .terminal import needs_stdout, note_debug

UNDRAWN = "nothing is drawn without --plot"


class Whole(click.IntRange):
    """A whole number, in click's messages too."""

    name = "whole number"


class Seed(Whole):
    """A seed that torch takes. Its maximum has 19 digits, too many for the range that click puts into the help."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number, unless it is too large."""
        seed: int = super().convert(value, param, ctx)
        if seed > MAX_SEED:
            self.fail(f"{seed} is larger than {MAX_SEED}", param, ctx)
        return seed


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that say how a MODEL is built; its argument `how` has them, --like and --key."""

    @wraps(function)
    def collected(*args: Any, seed: int | None, model_args: tuple[str, ...], **others: Any) -> Any:
        own = {name: value for name in OWN_OPTIONS if (value := others.pop(name, None)) is not None}
        of_file = {name: others.pop(name, None) for name in ("like", "key")}
        return function(*args, how=ModelOptions(seed, own | parse_arguments(model_args), **of_file), **others)

    positive = Whole(min=1)
    for option in (
        click.option("--seed", type=Seed(min=0), metavar="N", help="Seed for drawing a MODEL's weights. Default: 0."),
        click.option(
            "--model-arg",
            "model_args",
            multiple=True,
            metavar="KEY=VALUE",
            help="""Another argument for a library's MODEL or your own function; VALUE is a Python literal or text.
            Repeatable.""",
        ),
        click.option("--in-chans", type=positive, metavar="N", help="Channels of a MODEL's input. Default: its own."),
        click.option("--num-classes", type=positive, metavar="N", help="Classes of a MODEL. Default: its own."),
    ):
        collected = option(collected)
    return collected


like_option = click.option(
    "--like",
    metavar="MODEL",
    shell_complete=complete_models,
    help="MODEL that a FILE's weights belong to. It tells, for one, which layers are grouped.",
)


key_option = click.option(
    "--key", metavar="NAME", help="Entry of a FILE with its weights. Default: one with a usual name, or the only one."
)

names_option = partial(click.option, multiple=True, metavar="GLOB", shell_complete=complete_layers)
plot_layer_option = partial(click.option, "--plot-layer", metavar="NAME", shell_complete=complete_layers)
plot_option = partial(click.option, "--plot", type=click.Path(path_type=Path))
force_option = click.option("--force", is_flag=True, help="Overwrite an existing picture.")
json_option = partial(click.option, "--json", "as_json", is_flag=True, callback=needs_stdout)
debug_option = partial(
    click.option, "--debug", is_flag=True, is_eager=True, callback=note_debug, help="Show the traceback of an error."
)
device_option = partial(click.option, "--device", default="auto", metavar="NAME")
DEFAULTS, PAPER = Settings(), Settings.paper()
SETTINGS_OPTIONS = (
    click.option(
        "--preset",
        type=click.Choice(PRESETS),
        default="convsim",
        help=f"""Settings to start from: the defaults (convsim), or those of the method's published code (paper: --pairs
        {PAPER.pairs} --norm {PAPER.norm} --steps {PAPER.steps}, Adam).""",
    ),
    click.option("--pairs", type=click.Choice(PAIRS), help=f"Pairs of filters to compare. Default: {DEFAULTS.pairs}."),
    click.option(
        "--channels",
        type=click.Choice(CHANNELS_CHOICES),
        help=f"""Kernels of two filters to compare: those of the same input channel (matched), or all with all; auto is
        all where no normalization follows a layer, and else matched. Default: {DEFAULTS.channels}.""",
    ),
    click.option("--norm", type=click.Choice(NORMS), help=f"Keep the filters' norms or not. Default: {DEFAULTS.norm}."),
    click.option("--steps", type=Whole(min=1), metavar="N", help=f"Most steps of a layer. Default: {DEFAULTS.steps}."),
    names_option("--include", help="Treat only layers whose names match. Repeatable."),
    names_option("--exclude", help="Leave alone layers whose names match. Repeatable."),
)


def settings_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that say which layers are treated and how; its argument `settings` has the latter."""

    @wraps(function)
    def collected(*args: Any, preset: Preset, **others: Any) -> Any:
        names = ("pairs", "channels", "norm", "steps")
        chosen = {name: value for name in names if (value := others.pop(name)) is not None}
        return function(*args, settings=replace(Settings.preset(preset), **chosen), **others)

    for option in reversed(SETTINGS_OPTIONS):
        collected = option(collected)
    return collected


def check_picture(plot: Path | None, *, force: bool) -> None:
    """Refuse, without torch, a picture that cannot be drawn, and its options if there is none."""
    if plot is not None:
        check_plot(plot, overwrite=force)
    else:
        refuse_given(["plot_layer", "force"], UNDRAWN)


def refuse_given(names: Sequence[str], reason: str) -> None:
    """Refuse all of these parameters that were given on the command line."""
    given = [f"--{name.replace('_', '-')}" for name in names if is_by_hand(name)]
    if given:
        raise click.UsageError(f"{', '.join(given)}: {reason}")
