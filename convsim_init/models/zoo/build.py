"""The built-in models, from their entries in the catalog."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from convsim_init.errors import InputError
from convsim_init.models.zoo import catalog

if TYPE_CHECKING:
    import torch


TAKEN = ("num_classes", "in_chans")


def check(name: str, arguments: Mapping[str, object]) -> None:
    """Refuse arguments that no built-in model takes.

    Raises:
        InputError: If there are any.
    """
    others = [argument for argument in arguments if argument not in TAKEN]
    if others:
        raise InputError(
            f"{name}: a built-in model takes only {' and '.join(TAKEN)}, got {', '.join(others)}; leave that out"
        )


def build(name: str, arguments: Mapping[str, object]) -> torch.nn.Module:
    """The model of that name; ``num_classes`` and ``in_chans`` are the catalog's unless they are given."""
    entry = catalog.MODELS[name]
    family = getattr(import_module(f"convsim_init.models.zoo.{entry.module}"), entry.factory)
    defaults = {"num_classes": entry.num_classes, "in_chans": entry.in_chans}
    model: torch.nn.Module = family(**entry.arguments, **defaults | dict(arguments))
    return model
