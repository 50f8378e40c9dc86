"""Options of the main command from elsewhere: a file of settings, the folder's pyproject.toml, the environment.

The command line comes first, then the environment, then the file of ``--config``, then pyproject.toml. click applies
the values; this module reads the files and remembers where a value came from.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
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
ONLY_BY_HAND = ("config", "debug", "help")  # options of the command line alone
NOT_IN_PYPROJECT = ("like", "force")  # they run code and replace files: a file that just lies there may not do that
EITHER = {"seed", "seeds"}  # a place that has one of these voids both in the places after it
WHERE = "convsim_init.where"  # key in click's `meta` of the file that each option was taken from


def config_option(command: click.Command) -> click.Command:
    """Give a command ``--config``, and each of its options a variable of the environment."""
    click.option(
        "--config",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        # Before the other options, for it sets their defaults.
        is_eager=True,
        expose_value=False,
        callback=_read,
        help=f"""TOML file with options, such as steps = 20. They are also read from [tool.{TABLE}] in {PYPROJECT}
        in this folder and from variables such as {PREFIX}STEPS.""",
    )(command)
    for name, option in _options(command).items():
        option.envvar = PREFIX + name.replace("-", "_").upper()
    return command


def is_by_hand(name: str) -> bool:
    """Whether the parameter of that name was given on the command line."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def origins(ctx: click.Context) -> list[str]:
    """A line for each place other than the command line that options were taken from, with their values."""
    found: dict[str, list[str]] = {}
    for key, option in _options(ctx.command).items():
        name = str(option.name)
        source, value = ctx.get_parameter_source(name), ctx.params.get(name)
        if value is None or value is False or source not in (ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP):
            continue
        where = str(option.envvar) if source is ParameterSource.ENVIRONMENT else ctx.meta[WHERE][name]
        values = value if option.multiple else [shape_text(value) if isinstance(value, tuple) else value]
        found.setdefault(where, []).extend(f"--{key}" if option.is_flag else f"--{key} {value}" for value in values)
    return [f"from {where}: {', '.join(map(shown, options))}" for where, options in found.items()]


def _read(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    if ctx.resilient_parsing:  # while a shell completes a word
        return
    places: list[tuple[Path, Mapping[str, Any]]] = []
    if PYPROJECT.is_file():
        tools = _toml(PYPROJECT).get("tool")
        if isinstance(tools, Mapping) and TABLE in tools:
            places.append((PYPROJECT, tools[TABLE]))
            tell(f"options read from [tool.{TABLE}] in {PYPROJECT}")
    if path is not None:
        places.append((path, _toml(path)))
    defaults: dict[str, Any] = {}
    where = ctx.meta.setdefault(WHERE, {})
    for place, table in places:
        values = _values(ctx, place, table)
        _void_seeds(defaults, values)
        defaults |= values
        where |= dict.fromkeys(values, shown(str(place), PATH))
    _read_environment(ctx, defaults)
    ctx.default_map = defaults


def _read_environment(ctx: click.Context, defaults: dict[str, Any]) -> None:
    """Refuse variables with a bad value, and tell of those that are not read; click takes the values of the others."""
    options = {str(option.envvar): option for option in _options(ctx.command).values()}
    known = [variable.removeprefix(PREFIX) for variable in options]
    for variable in os.environ:
        if variable in options:
            value = options[variable].value_from_envvar(ctx)  # None if the variable is empty
            _check(ctx, variable, options[variable], value)
            if value is not None:
                _void_seeds(defaults, [options[variable].name])
        elif variable.startswith(PREFIX) and variable != SWITCH:
            tell(f"{shown(variable)} is not read{did_you_mean(variable.removeprefix(PREFIX), known, PREFIX)}")


def _void_seeds(defaults: dict[str, Any], given: Iterable[str | None]) -> None:
    """Take both seed and seeds from the defaults if a place before those has given one of them."""
    for name in EITHER if EITHER & set(given) else ():
        defaults.pop(name, None)


def _values(ctx: click.Context, path: Path, table: object) -> dict[str, Any]:
    """Values of a table by their parameters' names, as texts, which click reads as it reads the command line."""
    place = shown(str(path), PATH)
    if not isinstance(table, Mapping):
        raise click.UsageError(f"{place}: expected a table of options, got {quoted(table)}", ctx)
    options, values = _options(ctx.command), {}
    for written, value in table.items():
        key = str(written).replace("_", "-")  # as in Python and in reports, or as on the command line
        if key not in options:
            raise click.UsageError(f"{place}: {quoted(written)} is no option{did_you_mean(key, options)}", ctx)
        if path == PYPROJECT and key in NOT_IN_PYPROJECT:
            raise click.UsageError(f"{place}: {key} is taken only from the command line or a file of --config", ctx)
        option, several = options[key], isinstance(value, list)
        items = value if several else [value]
        texts = [str(item) for item in items if isinstance(item, str | int | float)]
        if len(texts) != len(items) or (several and not option.multiple):
            kind = "a list of texts" if option.multiple else "one value"
            raise click.UsageError(f"{place}: {key}: expected {kind}, got {quoted(value)}", ctx)
        values[str(option.name)] = texts if option.multiple else texts[0]
        _check(ctx, f"{place}: {key}", option, values[str(option.name)])
    return values


def _check(ctx: click.Context, where: str, option: click.Option, value: Any) -> None:
    """Refuse a value that click would refuse, and say where it stands."""
    try:
        option.type_cast_value(ctx, value)
    except (click.BadParameter, ValueError) as error:  # ValueError: a path with a null character
        raise click.UsageError(f"{where}: {getattr(error, 'message', error)}", ctx) from error


def _toml(path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows begins files with a mark
        return data
    except (OSError, ValueError, RecursionError) as error:
        raise click.UsageError(f"{shown(str(path), PATH)}: expected a TOML file, got {error}") from error


def _options(command: click.Command) -> dict[str, click.Option]:
    """The options that may be given elsewhere, by their names without the hyphens before them."""
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    # The longest name is the one without the single hyphen: --out, not -o.
    named = {max(option.opts, key=len).removeprefix("--"): option for option in options}
    return {name: option for name, option in named.items() if name not in ONLY_BY_HAND}
