"""Models that a function or class of the user makes, in a module or in a Python file.

Building one runs the code of that module and of the factory, and no other code of the user.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from os.path import isfile
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import ref

from convsim_init.errors import InputError
from convsim_init.models.spec import NAMED, Source, Spec
from convsim_init.models.user_code import is_importable, load_file, load_module, user_errors
from convsim_init.report.text import did_you_mean, shortened

if TYPE_CHECKING:
    import torch

_MISSING = object()
_returned: list[ref[torch.nn.Module]] = []  # models that factories have made


def check_place(spec: Spec) -> None:
    """Refuse a missing file, with the closest names, or a missing package, without running any code."""
    if spec.source is Source.MODULE:
        if isfile(spec.place):
            raise InputError(f"expected a Python file, got {spec.place!r}: put the function into one that ends in .py")
        if not is_importable(spec.place):
            alike = did_you_mean(spec.place, (source.value for source in NAMED))
            raise InputError(
                f"expected a module that can be imported, got {spec.place!r}: it is neither in this folder nor "
                f"installed{alike}"
            )
        return
    if not isfile(spec.place):
        path = Path(spec.place)
        alike = did_you_mean(path.name, (file.name for file in path.parent.glob("*.py")))
        raise InputError(f"expected a Python file to read, got {spec.place!r}, which is none{alike}")


def find_factory(spec: Spec) -> Callable[[Mapping[str, object]], torch.nn.Module]:
    """The function that makes a model from arguments by the factory that a spec names; an `InputError` without one."""
    import torch

    found: object = load_module(spec.place) if spec.source is Source.MODULE else load_file(spec.place)
    for part in spec.name.split("."):
        owner = found
        # A user's module may have a `__getattr__`, which this runs.
        with user_errors(spec.place):
            found = getattr(owner, part, _MISSING)
        if found is _MISSING:
            alike = did_you_mean(part, (name for name in dir(owner) if not name.startswith("_")))
            raise InputError(f"expected the name of a function or class in {spec.place}, got {spec.name!r}{alike}")
    if isinstance(found, torch.nn.Module) or not callable(found):
        what = "a model" if isinstance(found, torch.nn.Module) else f"{type(found).__name__}, which cannot be called"
        raise InputError(f"{spec.text}: expected a function or class, got {what}: name a function that returns a model")
    return partial(_build, spec.text, found)


def _build(text: str, factory: Callable[..., object], arguments: Mapping[str, object]) -> torch.nn.Module:
    import torch

    _check_arguments(text, factory, arguments)
    with user_errors(text):
        model = factory(**arguments)
    if not isinstance(model, torch.nn.Module):
        got = "None" if model is None else f"type {type(model).__name__}"
        raise InputError(f"{text}: expected it to return a torch.nn.Module, got {got}: return the model alone")
    # It would have the weights that were made of it, and not those of this seed.
    _returned[:] = [known for known in _returned if known() is not None]
    if any(known() is model for known in _returned):
        raise InputError(f"{text}: expected a new model, got the one that it returned before: build one in every call")
    _returned.append(ref(model))
    return model


def _check_arguments(text: str, factory: Callable[..., object], arguments: Mapping[str, object]) -> None:
    try:
        signature = inspect.signature(factory)
    except (ValueError, TypeError):  # raised for some callables that are not written in Python
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        plain = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
        bare = str(signature.replace(parameters=plain, return_annotation=signature.empty))
        parameters = shortened(" ".join(bare.split()), 200)
        advice = "; give it by name (--model-arg NAME=VALUE in the shell)" if str(error).startswith("missing") else ""
        raise InputError(
            f"{text}: expected arguments that fit {parameters}, got {', '.join(arguments) or 'none'}: {error}{advice}"
        ) from error
