"""The models that can be built by name. torch is imported when one is built, not before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from numbers import Integral
from typing import TYPE_CHECKING

from convsim_init.errors import InputError
from convsim_init.models import catalog
from convsim_init.models.catalog import UnknownModelError

if TYPE_CHECKING:
    import torch

__all__ = ["UnknownModelError", "build_model"]

_LARGEST_SEED = 2**63 - 1


def build_model(
    spec: str,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    seed: int = 0,
    **kwargs: object,
) -> torch.nn.Module:
    """Build a model with weights drawn on the CPU in float32.

    The same arguments give the same weights, whatever the caller's default device and dtype, and the caller's random
    state is left as it was.

    Args:
        spec: A built-in model's name, for instance `"resnet18"`; `catalog.names()` has them all.
        num_classes: Outputs of the classifier, at least 1. Default: the model's, 1000 for ImageNet and 10 for CIFAR.
        in_chans: Channels of the input, at least 1. Default: 3.
        seed: Seeds the draws, 0 to 2**63 - 1.
        **kwargs: Further arguments of the model's factory. Built-in models take none.

    Returns:
        The model, in training mode.

    Raises:
        UnknownModelError: No model goes by `spec`.
        InputError: An argument has the wrong type, is out of range, or is not one the model takes.
    """
    if not isinstance(spec, str):
        raise InputError(
            f"spec: expected a model's name, got type {type(spec).__name__}; pass a string such as 'resnet18'"
        )
    classes = None if num_classes is None else _whole("num_classes", num_classes, 1)
    channels = None if in_chans is None else _whole("in_chans", in_chans, 1)
    checked_seed = _whole("seed", seed, 0, _LARGEST_SEED)
    factory = _built_in(spec, classes, channels, kwargs)
    with _reproducible(checked_seed):
        return factory()


def _whole(name: str, value: object, low: int, high: int | None = None) -> int:
    whole = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if whole is not None and low <= whole and (high is None or whole <= high):
        return whole
    span = f"at least {low}" if high is None else f"from {low} to {high}"
    got = f"type {type(value).__name__}" if whole is None else str(whole)  # a repr may fill many lines
    raise InputError(f"{name}: expected a whole number {span}, got {got}; pass one in that range or leave it out")


def _built_in(
    name: str, num_classes: int | None, in_chans: int | None, kwargs: Mapping[str, object]
) -> Callable[[], torch.nn.Module]:
    entry = catalog.find(name)
    if kwargs:
        given = ", ".join(kwargs)
        raise InputError(f"{name}: a built-in model takes only num_classes and in_chans, got {given}; leave that out")
    family = getattr(import_module(f"{__name__}.{entry.module}"), entry.factory)
    return partial(
        family,
        **entry.arguments,
        num_classes=entry.num_classes if num_classes is None else num_classes,
        in_chans=entry.in_chans if in_chans is None else in_chans,
    )


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    import torch

    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # torch.manual_seed would also reseed the accelerators, whose state fork_rng does not keep here.
        torch.default_generator.manual_seed(seed)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
