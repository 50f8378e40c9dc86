"""What a FILE or a MODEL on the command line stands for, and the options that say how a MODEL is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from convsim_init.errors import InputError
from convsim_init.files import SUFFIXES, check_source
from convsim_init.models import build_model, check_model, resolve
from convsim_init.models.arguments import parse_arguments

if TYPE_CHECKING:
    import torch


class Whole(click.IntRange):
    """A whole number, in click's messages too."""

    name = "whole number"


@dataclass(frozen=True)
class ModelOptions:
    """How a MODEL is built; None and nothing where the user did not say."""

    num_classes: int | None = None
    in_chans: int | None = None
    seed: int | None = None
    arguments: dict[str, object] = field(default_factory=dict)

    @property
    def given(self) -> list[str]:
        """The options that the user gave."""
        options = {
            "--num-classes": self.num_classes is not None,
            "--in-chans": self.in_chans is not None,
            "--seed": self.seed is not None,
            "--model-arg": bool(self.arguments),
        }
        return [option for option, is_given in options.items() if is_given]

    def check(self, spec: str) -> None:
        """Refuse, without torch, what is no model that can be built like this."""
        check_model(spec, num_classes=self.num_classes, in_chans=self.in_chans, **self.arguments)


@dataclass(frozen=True)
class Loaded:
    """What a FILE or a MODEL stood for.

    Attributes:
        content: The model, or the state dict in the file.
        name: The spec, with the library that a bare name was found in.
        seed: Of the drawn weights; None for a file.
        remarks: What to know of how it was found.
    """

    content: torch.nn.Module | Mapping[str, torch.Tensor]
    name: str
    seed: int | None = None
    remarks: list[str] = field(default_factory=list)


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that say how a MODEL is built; it gets them as one argument, `how`."""

    @wraps(function)
    def collected(
        *args: Any,
        num_classes: int | None,
        in_chans: int | None,
        seed: int | None,
        model_args: tuple[str, ...],
        **others: Any,
    ) -> Any:
        how = ModelOptions(num_classes, in_chans, seed, parse_arguments(model_args))
        return function(*args, how=how, **others)

    whole, positive = Whole(min=0), Whole(min=1)
    for option in (
        click.option("--seed", type=whole, metavar="N", help="Of a MODEL's drawn weights. Default: 0."),
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


def is_file(spec: str) -> bool:
    """Whether it names a checkpoint, by its suffix, and not a model."""
    return Path(spec).suffix in SUFFIXES


def check_source_or_model(spec: str, how: ModelOptions) -> None:
    """Refuse what is neither a file that can be read nor a model that can be built, without torch."""
    if is_file(spec):
        check_source(spec)
    elif ":" not in spec and Path(spec).is_file():
        raise InputError(
            f"expected a file name ending in {', '.join(SUFFIXES)} or a model's name, got {spec!r}: rename it"
        )
    else:
        how.check(spec)


def load(spec: str, how: ModelOptions) -> Loaded:
    """The state dict in that file, or the model that is built from that spec."""
    if is_file(spec):
        from convsim_init.reading import read_state_dict

        return Loaded(read_state_dict(spec), spec)
    found, seed = resolve(spec), how.seed or 0
    model = build_model(found.spec.text, num_classes=how.num_classes, in_chans=how.in_chans, seed=seed, **how.arguments)
    return Loaded(model, found.spec.text, seed, [found.remark] if found.remark else [])
