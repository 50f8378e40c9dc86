"""What a FILE or a MODEL stands for, and the options that say how a MODEL is built."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from os.path import isdir, isfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from convsim_init.errors import InputError
from convsim_init.files.sources import CHECKPOINT, FOREIGN, READ_SUFFIXES, check_source, is_source, without_weights
from convsim_init.models.build import build_model, check_model, find_model
from convsim_init.models.libraries import resolve
from convsim_init.models.spec import CONFIG
from convsim_init.models.zoo.catalog import MODELS
from convsim_init.plotting.figure import check_plot
from convsim_init.report.text import PATH, quoted, shown, some
from convsim_init.settings import MAX_SEED

from .arguments import OWN, parse_arguments
from .completion import complete_layers, complete_models
from .config import is_by_hand
from .signals import exit_on_signal
from .terminal import needs_stdout, note_debug

if TYPE_CHECKING:
    import torch


UNDRAWN = "nothing is drawn without --plot"
INFERRED = "layers of a file are inferred from names and shapes; --like MODEL settles which are grouped or transposed"


class Whole(click.IntRange):
    """A whole number, in click's messages too."""

    name = "whole number"


class Seed(Whole):
    """A seed that torch takes; its upper limit, which has 19 digits, is not in the help."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number, unless it is too large."""
        seed: int = super().convert(value, param, ctx)
        if seed > MAX_SEED:
            self.fail(f"{seed} is larger than {MAX_SEED}", param, ctx)
        return seed


@dataclass(frozen=True)
class ModelOptions:
    """How a MODEL is built and a FILE is read."""

    seed: int | None  # if the user gave one
    arguments: dict[str, Any]  # what else was given, as `build_model` takes it
    like: str | None = None  # model that a file's weights belong to
    key: str | None = None  # entry of a file that holds the weights

    def check(self, spec: str) -> None:
        """Refuse, without torch, what is no model that can be built like this."""
        check_model(spec, **self.arguments)

    def build(self, spec: str) -> torch.nn.Module:
        """Build the model."""
        return build_model(spec, seed=self.seed or 0, **self.arguments)


@dataclass(frozen=True)
class Loaded:
    """What a FILE or a MODEL stood for."""

    content: torch.nn.Module | Mapping[str, torch.Tensor]  # the model, or the state dict in the file
    name: str  # the spec, with the library that a bare name was found in
    seed: int | None = None  # of the drawn weights; None for a file
    remarks: list[str] = field(default_factory=list)  # on how it was found
    built: str | None = None  # spec that a model was built of
    filled: frozenset[str] = frozenset()  # names of modules that the model's own code filled, as by `load_state_dict`


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of how a MODEL is built, as one argument, `how`, with those of a FILE that it has."""

    @wraps(function)
    def collected(*args: Any, seed: int | None, model_args: tuple[str, ...], **others: Any) -> Any:
        own = {name: value for name in OWN if (value := others.pop(name, None)) is not None}
        of_file = {name: others.pop(name, None) for name in ("like", "key")}
        return function(*args, how=ModelOptions(seed, own | parse_arguments(model_args), **of_file), **others)

    positive = Whole(min=1)
    for option in (
        click.option("--seed", type=Seed(min=0), metavar="N", help="Seed of a MODEL's drawn weights. Default: 0."),
        click.option(
            "--model-arg",
            "model_args",
            multiple=True,
            metavar="KEY=VALUE",
            help="""Further argument of a library's MODEL or your own factory; VALUE is a Python literal, or else text.
            Repeatable.""",
        ),
        click.option("--in-chans", type=positive, metavar="N", help="Channels of a MODEL's input. Default: its own."),
        click.option("--num-classes", type=positive, metavar="N", help="Outputs of a MODEL. Default: its own."),
    ):
        collected = option(collected)
    return collected


like_option = click.option(
    "--like",
    metavar="MODEL",
    shell_complete=complete_models,
    help="Model that a FILE's weights belong to: tells which layers are grouped and so on.",
)


key_option = click.option(
    "--key", metavar="NAME", help="Entry of a FILE that holds the weights. Default: a usual one, or the only one."
)

names_option = partial(click.option, multiple=True, metavar="GLOB", shell_complete=complete_layers)  # of layers
plot_layer_option = partial(click.option, "--plot-layer", metavar="NAME", shell_complete=complete_layers)
plot_option = partial(click.option, "--plot", type=click.Path(path_type=Path))
force_option = click.option("--force", is_flag=True, help="Overwrite an existing picture.")
json_option = partial(click.option, "--json", "as_json", is_flag=True, callback=needs_stdout)
debug_option = partial(
    click.option, "--debug", is_flag=True, is_eager=True, callback=note_debug, help="Show the traceback of an error."
)


def is_file(spec: str) -> bool:
    """Whether it names a checkpoint, a file or a folder, and not a model; a built-in's folder is written ./resnet18."""
    return spec not in MODELS and is_source(spec)


def check_sources(specs: Sequence[str], how: ModelOptions, *, drawn: bool = False) -> None:
    """Refuse, without torch, what is no file or model, and options of no use, also where files are `drawn` anew."""
    files = [spec for spec in specs if is_file(spec)]
    for spec in specs:
        _check_source(spec, how)
    if not files and is_by_hand("key"):
        raise click.UsageError("--key: expected a FILE that has that entry, got none: leave it out")
    if how.like is not None:
        if not files:
            raise click.UsageError("--like: expected a FILE that is like that model, got none")
        how.check(how.like)
    given = [option for name, option in (OWN | {"model_args": "--model-arg"}).items() if is_by_hand(name)]
    # A file uses the seed where it is drawn anew, and the others for the model that it is like.
    unused = [option for option in given if not (drawn if option == "--seed" else how.like)]
    if unused and len(files) == len(specs):
        hint = "" if unused == ["--seed"] else "; --like names the model it belongs to"
        raise click.UsageError(f"{', '.join(unused)}: a file has its weights already{hint}")


def check_picture(plot: Path | None, *, force: bool) -> None:
    """Refuse, without torch, a picture that cannot be drawn, and options of one where there is none."""
    if plot is not None:
        check_plot(plot, overwrite=force)
    else:
        refuse_given(["plot_layer", "force"], UNDRAWN)


def refuse_given(names: Sequence[str], reason: str) -> None:
    """Refuse those of some options that were given on the command line, by their parameters' names."""
    given = [f"--{name.replace('_', '-')}" for name in names if is_by_hand(name)]
    if given:
        raise click.UsageError(f"{', '.join(given)}: {reason}")


def check_found(specs: Sequence[str], like: str | None) -> None:
    """Refuse a model that its library or module does not have, before any is built."""
    models = [spec for spec in [*specs, like] if spec is not None and not is_file(spec)]
    if models:
        with exit_on_signal():
            import torch  # noqa: F401
        for model in dict.fromkeys(models):
            find_model(model)


def load(spec: str, how: ModelOptions) -> Loaded:
    """The model of that spec, or what is in that file: a state dict or, if it is like a model, that one."""
    if is_file(spec) and how.like is None:
        return _load_file(spec, how.key)
    from convsim_init.checkpoint.load import load_checkpoint
    from convsim_init.layers import tree
    from convsim_init.layers.names import bare_name
    from convsim_init.tracking.patching import noting_loaded

    found = resolve(how.like if how.like is not None and is_file(spec) else spec)
    name, remarks = found.text, [found.remark] if found.remark else []
    loaded: list[torch.nn.Module] = []
    with noting_loaded(loaded.append):
        model = how.build(name)
    if is_file(spec):
        report = load_checkpoint(model, spec, strict=True, key=how.key)
        return Loaded(model, spec, None, [*remarks, *str(report).splitlines()], built=name)
    parts = set(map(id, loaded))
    filled = frozenset(bare_name(name) for name, part in tree.named_modules(model) if id(part) in parts)
    return Loaded(model, name, how.seed or 0, remarks, built=name, filled=filled)


def _check_source(spec: str, how: ModelOptions) -> None:
    rest = os.path.splitdrive(spec)[1]  # without the colon of a drive of Windows
    if is_file(spec) or Path(spec).suffix in FOREIGN:
        check_source(spec)
    elif ":" not in rest and Path(spec).suffix != ".py" and isfile(spec):
        raise InputError(
            f"expected a file name ending in {', '.join(READ_SUFFIXES)} or a model's name, got {spec!r}: {CHECKPOINT}"
        )
    # A name without a separator may be a model's, whatever folder is called like it.
    elif ":" not in rest and {"/", os.sep} & set(spec) and isdir(spec) and not isfile(Path(spec, CONFIG)):
        raise without_weights(spec)
    else:
        how.check(spec)


def _load_file(path: str, key: str | None) -> Loaded:
    from convsim_init.checkpoint.read import bare_tensors, read_checkpoint
    from convsim_init.layers.inferred import infer_layers

    checkpoint = read_checkpoint(path, key)
    state = bare_tensors(checkpoint, path)
    if not any(infer_layers(state)):
        raise InputError(
            f"expected a file with convolution weights, of rank 3 to 5, got {shown(path, PATH)!r}, none of whose "
            f"{len(state)} tensors is one: name that of a convolutional network"
        )
    remarks, extra = [INFERRED], [*checkpoint.extra, *checkpoint.unread]
    if checkpoint.wrapper:
        more = f"; --key takes another: {some(map(shown, checkpoint.others))}" if checkpoint.others else ""
        remarks.append(f"the weights are those under {shown(checkpoint.wrapper)!r}{more}")
    remarks += [f"left out, for it is no tensor: {some(map(shown, extra))}"] if extra else []
    remarks += _prefix_remarks(list(checkpoint.tensors), list(state), path)
    return Loaded(state, path, None, remarks)


def _prefix_remarks(keys: Sequence[str], bare: Sequence[str], path: str) -> list[str]:
    if keys == bare:
        return []
    prefix, file = keys[0].removesuffix(bare[0]), shown(path, PATH)
    if all(key == prefix + one for key, one in zip(keys, bare, strict=True)):
        return [f"{quoted(prefix)} was taken off every key of {file}; --prefix {shown(prefix)} puts it back"]
    key, one = next((key, one) for key, one in zip(keys, bare, strict=True) if key != one)
    return [f"{file} was read without what wrappers add to its keys: {quoted(one)} for {quoted(key)}"]
