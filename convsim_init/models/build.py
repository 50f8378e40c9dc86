"""Building a model from its spec, whatever its source. torch is imported only when a model is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from convsim_init.errors import InputError
from convsim_init.models.factories import check_place, find_factory
from convsim_init.models.hub import check_described, find_described
from convsim_init.models.libraries import check_library_model, find_builder, installed, resolve, unknown_model
from convsim_init.models.spec import DESCRIBED, LIBRARIES, Source, Spec, parse
from convsim_init.models.user_code import import_context
from convsim_init.models.zoo.catalog import MODELS
from convsim_init.settings import MAX_SEED, check_whole

if TYPE_CHECKING:
    import torch


def build_model(
    spec: str, /, *, num_classes: int | None = None, in_chans: int | None = None, seed: int = 0, **kwargs: object
) -> torch.nn.Module:
    """Build a model with weights drawn on the CPU in float32, never pretrained ones.

    The same arguments give the same weights, whatever the caller's default device and dtype, and the caller's random
    state, Python's, NumPy's and that of torch on the CPU, is left as it was.

    Args:
        spec: One of

            - a built-in model's name such as ``"resnet18"``; another bare name is looked up in torchvision, then timm
            - ``"torchvision:NAME"`` or ``"timm:NAME"``
            - ``"transformers:CLASS"``, by its default config; a folder with a ``config.json`` of transformers or timm;
              or ``"hf-hub:NAME"``, whose config is in the local cache of Hugging Face
            - ``"package.module:factory"`` or ``"path/to/file.py:factory"``: a function or class of your own that
              returns a module. **Its code is run.** It may import what lies in the working folder or beside the
              file, and what it prints goes to stderr.
        num_classes: Outputs of the classifier, at least 1. Default: the model's.
        in_chans: Channels of the input, at least 1; torchvision's models do not take it. Default: the model's.
        seed: Seed of the draws, 0 to 2**63 - 1.
        **kwargs: Further arguments of the library's builder or of the factory. Built-in models take none.

    Returns:
        The model, in training mode.

    Raises:
        UnknownModelError: No model goes by `spec`.
        InputError: The spec is malformed, its library is missing or broken, its factory raised or returned no new
            module, or an argument has the wrong type, is out of range, or is not one the model takes.

    Examples:
        >>> model = ci.build_model("cifar_resnet18", num_classes=10, seed=3)
        >>> model.fc.out_features
        10
    """
    checked_seed = check_whole("seed", seed, 0, MAX_SEED)
    arguments = check_model(spec, num_classes=num_classes, in_chans=in_chans, **kwargs)
    found = resolve(spec)
    # Once more, because only now is it known which library a bare name belongs to.
    _check(found, arguments)
    with _imports(found):
        with _reproducible(checked_seed):  # by itself, because an import may draw numbers, but only the first time
            build = _builder(found)
        with _reproducible(checked_seed):
            model = build(arguments)
    from convsim_init.layers import tree

    for module in tree.modules(model):
        module.training = True  # a class may use `train()` for something else, such as starting to train
    return model


def find_model(spec: str, /) -> None:
    """Import what builds a model, but do not build it; raises the same errors as `build_model`."""
    found = resolve(spec)
    # The caller's random state stays as it is, even if an import draws numbers.
    with _imports(found), _reproducible(0):
        _builder(found)


def check_model(
    spec: str, /, *, num_classes: int | None = None, in_chans: int | None = None, **kwargs: object
) -> dict[str, object]:
    """Refuse what `build_model` would refuse, if that shows without torch or user code; returns the given arguments."""
    if not isinstance(spec, str):
        raise InputError(
            f"spec: expected a model's name, got type {type(spec).__name__}; pass a string such as 'resnet18'"
        )
    parsed = parse(spec)
    given = {"num_classes": num_classes, "in_chans": in_chans}
    arguments = {name: check_whole(name, value, 1) for name, value in given.items() if value is not None} | kwargs
    _check(parsed, arguments)
    return arguments


def _check(spec: Spec, arguments: Mapping[str, object]) -> None:
    if spec.source is Source.BUILT_IN:
        MODELS[spec.name].check_arguments(arguments)
    elif spec.source is Source.ANY:
        if not installed():
            raise unknown_model(spec.name)
    elif spec.source is Source.CHECKPOINT:
        raise InputError(f"expected a model to build, got the checkpoint {spec.text!r}: name the model it belongs to")
    elif spec.source in LIBRARIES:
        check_library_model(spec.source, spec.name, arguments)
    elif spec.source in DESCRIBED:
        check_described(spec)
    else:
        check_place(spec)


def _builder(spec: Spec) -> Callable[[Mapping[str, object]], torch.nn.Module]:
    if spec.source is Source.BUILT_IN:
        return MODELS[spec.name].build
    if spec.source in DESCRIBED:
        return find_described(spec)
    return find_builder(spec.source, spec.name) if spec.source in LIBRARIES else find_factory(spec)


def _imports(spec: Spec) -> AbstractContextManager[None]:
    own = spec.source in (Source.MODULE, Source.FILE)
    return import_context(spec.place if spec.source is Source.FILE else None) if own else nullcontext()


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    import random

    import numpy
    import torch

    from convsim_init.layers.forward.isolation import random_states

    dtype = torch.get_default_dtype()
    with random_states(()), torch.device("cpu"):
        # torch.manual_seed would also reseed the accelerators, whose states are not restored here.
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        # NumPy takes seeds of 32 bits.
        numpy.random.seed(seed % 2**32)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
