"""Options of the main command from elsewhere: a file of settings, the folder's pyproject.toml, the environment.

The command line comes first, then the environment, then the file of ``--config``, then pyproject.toml. click takes
the values; what is here reads the files and tells where a value came from.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from convsim_init.report.table import shape_text
from convsim_init.report.text import PATH, did_you_mean, quoted, shown
from convsim_init.settings import SWITCH

from .terminal import tell

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT, TABLE = Path("pyproject.toml"), "convsim-init"
PREFIX = "CONVSIM_INIT_"
BY_HAND = ("config", "debug", "help")  # options that nothing else can give
EITHER = {"seed", "seeds"}  # of these one place has one, and both of the places below it are void
BY_NAME = ("like", "force")  # nor one that just lies in the folder: they run code and replace files
WHERE = "convsim_init.where"


def config_option(command: click.Command) -> click.Command:
    """Give a command ``--config`` and, to each of its options, a variable of the environment."""
    click.option(
        "--config",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        # Before the other options, for it sets their defaults.
        is_eager=True,
        expose_value=False,
        callback=_read,
        help=f"""TOML file of options, such as steps = 20. So are [tool.{TABLE}] in {PYPROJECT} here, and variables such
        as {PREFIX}STEPS.""",
    )(command)
    for name, option in _options(command).items():
        option.envvar = PREFIX + name.replace("-", "_").upper()
    return command


def is_by_hand(name: str) -> bool:
    """Whether the parameter of that name was given on the command line."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def origins(ctx: click.Context) -> list[str]:
    """The options that were given elsewhere than on the command line, with their values, a line for each place."""
    found: dict[str, list[str]] = {}
    for key, option in _options(ctx.command).items():
        name = str(option.name)
        source, value = ctx.get_parameter_source(name), ctx.params.get(name)
        if value is None or value is False or source not in (ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP):
            continue
        where = str(option.envvar) if source is ParameterSource.ENVIRONMENT else ctx.meta[WHERE][name]
        values = value if option.multiple else [shape_text(value) if isinstance(value, tuple) else value]
        found.setdefault(where, []).extend(f"--{key}" if option.is_flag else f"--{key} {one}" for one in values)
    return [f"from {where}: {', '.join(map(shown, options))}" for where, options in found.items()]


def _read(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    # While a shell completes a word, nothing is read or told.
    if ctx.resilient_parsing:
        return
    places: list[tuple[Path, Mapping[str, Any]]] = []
    if PYPROJECT.is_file():
        tools = _toml(PYPROJECT).get("tool")
        if isinstance(tools, Mapping) and TABLE in tools:
            places.append((PYPROJECT, tools[TABLE]))
            tell(f"options read from [tool.{TABLE}] in {PYPROJECT}")
    if path is not None:
        places.append((path, _toml(path)))
    ctx.default_map, where = {}, ctx.meta.setdefault(WHERE, {})
    for place, table in places:
        values = _values(ctx, place, table)
        void = EITHER if EITHER & values.keys() else set()
        ctx.default_map = {name: one for name, one in ctx.default_map.items() if name not in void} | values
        where |= dict.fromkeys(values, shown(str(place), PATH))
    options = {str(option.envvar): option for option in _options(ctx.command).values()}
    known = [variable.removeprefix(PREFIX) for variable in options]
    for variable in os.environ:
        if variable in options:
            value = options[variable].value_from_envvar(ctx)  # None of an empty one, which gives nothing
            _check(ctx, variable, options[variable], value)
            for name in EITHER if value is not None and options[variable].name in EITHER else ():
                ctx.default_map.pop(name, None)
        elif variable.startswith(PREFIX) and variable != SWITCH:
            tell(f"{shown(variable)} is not read{did_you_mean(variable.removeprefix(PREFIX), known, PREFIX)}")


def _values(ctx: click.Context, path: Path, table: object) -> dict[str, Any]:
    """Values by the names of their parameters, as texts, which click then reads as on the command line."""
    place = shown(str(path), PATH)
    if not isinstance(table, Mapping):
        raise click.UsageError(f"{place}: expected a table of options, got {quoted(table)}", ctx)
    options, values = _options(ctx.command), {}
    for key, value in table.items():
        if key not in options:
            raise click.UsageError(f"{place}: {quoted(key)} is no option{did_you_mean(key, options)}", ctx)
        if path == PYPROJECT and key in BY_NAME:
            raise click.UsageError(f"{place}: {key} is taken only from the command line or a file of --config", ctx)
        option, several = options[key], isinstance(value, list)
        texts = [str(one) for one in (value if several else [value]) if isinstance(one, str | int | float)]
        if len(texts) != (len(value) if several else 1) or (several and not option.multiple):
            kind = "a list of texts" if option.multiple else "one value"
            raise click.UsageError(f"{place}: {key}: expected {kind}, got {quoted(value)}", ctx)
        values[str(option.name)] = texts if option.multiple else texts[0]
        _check(ctx, f"{place}: {key}", option, values[str(option.name)])
    return values


def _check(ctx: click.Context, where: str, option: click.Option, value: Any) -> None:
    """Refuse what click would refuse, and say where it stands."""
    try:
        option.type_cast_value(ctx, value)
    except (click.BadParameter, ValueError) as error:  # the latter of a path with a null character
        raise click.UsageError(f"{where}: {getattr(error, 'message', error)}", ctx) from error


def _toml(path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows begins files with a mark
        return data
    except (OSError, ValueError, RecursionError) as error:
        raise click.UsageError(f"{shown(str(path), PATH)}: expected a TOML file, got {error}") from error


def _options(command: click.Command) -> dict[str, click.Option]:
    """The options that may be given elsewhere, by their names without the hyphens before them."""
    options = [one for one in command.params if isinstance(one, click.Option)]
    # Of -o and --out the long one.
    named = {max(option.opts, key=len).removeprefix("--"): option for option in options}
    return {name: option for name, option in named.items() if name not in BY_HAND}
