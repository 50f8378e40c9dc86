"""Options of the main command from elsewhere: a file of settings, the folder's pyproject.toml, the environment.

The command line comes first, then the environment, then the file of ``--config``, then pyproject.toml. The values of
the last three become click's defaults; this module reads them and remembers where a value came from.
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
ONLY_BY_HAND = ("config", "debug", "help")  # options of the command line alone
NOT_IN_PYPROJECT = ("like", "force")  # they run code and replace files: a file that just lies there may not do that
EITHER = {"seed", "seeds"}  # a place that has one of these voids both in the places after it
WHERE = "convsim_init.where"  # key in click's `meta` of the place that each option was taken from

Values = dict[str, tuple[Any, str]]  # value and place of each option, by its parameter's name


def is_by_hand(name: str) -> bool:
    """Whether the parameter of that name was given on the command line."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def origins(ctx: click.Context) -> list[str]:
    """A line for each place other than the command line that options were taken from, with their values."""
    found: dict[str, list[str]] = {}
    for key, option in _options(ctx.command).items():
        name = str(option.name)
        value = ctx.params.get(name)
        if value is None or value is False or ctx.get_parameter_source(name) is not ParameterSource.DEFAULT_MAP:
            continue
        values = value if option.multiple else [shape_text(value) if isinstance(value, tuple) else value]
        texts = [f"--{key}" if option.is_flag else f"--{key} {value}" for value in values]
        found.setdefault(ctx.meta[WHERE][name], []).extend(texts)
    return [f"from {where}: {', '.join(map(shown, options))}" for where, options in found.items()]


def _read(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    if ctx.resilient_parsing:  # while a shell completes a word
        return
    tables: list[tuple[Path, object]] = []
    if PYPROJECT.is_file():
        tools = _toml(PYPROJECT).get("tool")
        for name, table in tools.items() if isinstance(tools, Mapping) else ():
            if name.replace("_", "-") == TABLE:  # as in the shell, or as in Python
                tables.append((PYPROJECT, table))
                tell(f"options read from [tool.{name}] in {PYPROJECT}")
    if path is not None:
        tables.append((path, _toml(path)))
    found: Values = {}
    for values in (*(_from_table(ctx, *table) for table in tables), _from_environment(ctx)):
        if EITHER & values.keys():
            found = {name: value for name, value in found.items() if name not in EITHER}
        found |= values
    ctx.default_map = {name: value for name, (value, _) in found.items()}
    ctx.meta[WHERE] = {name: where for name, (_, where) in found.items()}


def _from_environment(ctx: click.Context) -> Values:
    """Values of the environment's variables, but for empty ones; a line on stderr tells of those that are no option."""
    options = {PREFIX + name.replace("-", "_").upper(): option for name, option in _options(ctx.command).items()}
    known = [variable.removeprefix(PREFIX) for variable in options]
    values: Values = {}
    for variable, text in os.environ.items():
        option = options.get(variable)
        if option is not None and text:
            value = option.type.split_envvar_value(text) if option.multiple else text
            values[str(option.name)] = _checked(ctx, variable, option, value), variable
        elif option is None and variable.startswith(PREFIX) and variable != SWITCH:
            tell(f"{shown(variable)} is not read{did_you_mean(variable.removeprefix(PREFIX), known, PREFIX)}")
    return values


def _from_table(ctx: click.Context, path: Path, table: object) -> Values:
    """Values of a table in a file, as texts, which click reads as it reads the command line."""
    place = shown(str(path), PATH)
    if not isinstance(table, Mapping):
        raise click.UsageError(f"{place}: expected a table of options, got {quoted(table)}", ctx)
    options, values = _options(ctx.command), Values()
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
        given = _checked(ctx, f"{place}: {key}", option, texts if option.multiple else texts[0])
        values[str(option.name)] = given, place
    return values


def _checked(ctx: click.Context, where: str, option: click.Option, value: Any) -> Any:
    """The value, unless click would refuse it; the error says where it stands."""
    try:
        option.type_cast_value(ctx, value)
        return value
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


config_option = click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    # Before the other options, for it sets their defaults.
    is_eager=True,
    expose_value=False,
    callback=_read,
    help=f"""TOML file with options, such as steps = 20. They are also read from [tool.{TABLE}] in {PYPROJECT} in this
    folder and from variables such as {PREFIX}STEPS.""",
)
