"""Models from the registries of torchvision and timm, without pretrained weights.

Each library, and torch with it, is imported only when one of its models is asked for. A bare name that is not built in
is looked up in both.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from os.path import isdir
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from convsim_init.errors import InputError
from convsim_init.files.sources import without_weights
from convsim_init.models.spec import LIBRARIES, Source, Spec, parse
from convsim_init.models.user_code import is_importable, user_errors
from convsim_init.models.zoo.catalog import MODELS, UnknownModelError, closest
from convsim_init.version import installed_version

if TYPE_CHECKING:
    import torch

TRAINED = {  # arguments that ask for pretrained weights
    Source.TORCHVISION: ("weights", "weights_backbone", "pretrained", "pretrained_backbone"),
    Source.TIMM: ("pretrained", "checkpoint_path"),
}
# Other decorators, of several lines, may stand between this one and the function.
REGISTERED = re.compile(r"^@register_model\b.*\n(?:[@ )].*\n)*def (\w+)", re.MULTILINE)


def installed() -> list[Source]:
    """The installed libraries, in the order in which a bare name is looked up in them."""
    return [library for library in LIBRARIES if find_spec(library.value) is not None]


def require(package: str, needed_by: str, to_install: str) -> None:
    """Refuse a package that is not installed."""
    if find_spec(package) is None:
        raise InputError(f"{needed_by} needs the package {package}, which is not installed: pip install {to_install}")


def check_library_model(library: Source, name: str, arguments: Mapping[str, object]) -> None:
    """Refuse a library that is not installed and arguments that none of its models takes, without importing torch."""
    require(library.value, f"{library.value}:{name}", f"'convsim-init[{library.value}]'")
    # A false value declines pretrained weights, which is allowed.
    trained = [argument for argument, value in arguments.items() if value and argument in TRAINED[library]]
    if trained:
        raise InputError(
            f"{library.value}:{name}: expected arguments of a model that is yet to be trained, got {trained[0]}: leave "
            f"it out; the weights are drawn anew"
        )
    if library is Source.TORCHVISION and "in_chans" in arguments:
        raise InputError(
            f"{library.value}:{name}: torchvision's models take no in_chans: leave it out, or take timm's or a factory "
            f"of your own"
        )


def names(library: Source, pattern: str = "*") -> list[str]:
    """Names of a library's models that match a shell pattern, in its order; an `InputError` if it is not installed."""
    check_library_model(library, pattern, {})
    registry = _load(library)
    keyword = "filter" if library is Source.TIMM else "include"
    return [str(name) for name in registry.list_models(**{keyword: pattern})]


def names_in_sources(library: Source) -> list[str]:
    """Names of all models of a library, read from its source files: for shells, which cannot wait for an import."""
    spec = find_spec(library.value)
    if spec is None or spec.origin is None:
        return []
    sources = sorted((Path(spec.origin).parent / "models").rglob("*.py"))
    return [name for path in sources for name in REGISTERED.findall(path.read_text(encoding="utf-8"))]


def has(library: Source, name: str) -> bool:
    """Whether a library has a model of that name; a name of timm may end with the tag of pretrained weights."""
    registry = _load(library)
    return bool(registry.is_model(name)) if library is Source.TIMM else name in registry.list_models()


def resolve(text: str) -> Spec:
    """The spec with its source: a bare name that is not built in is torchvision's if it has that model, else timm's.

    Raises:
        UnknownModelError: If no installed library has it, or one of them cannot be imported.
        InputError: If the spec is malformed.
    """
    spec = parse(text)
    if spec.source is not Source.ANY:
        return spec
    try:
        owners = [library for library in installed() if has(library, text)]
    except InputError as error:
        if isdir(text):
            raise without_weights(text) from error
        alike = " or ".join(closest(text))
        hint = f" (did you mean {alike}?)" if alike else ""
        raise UnknownModelError(
            f"{text!r} is no built-in model{hint}, and the libraries cannot be asked: {error}"
        ) from error
    if not owners:
        raise unknown_model(text)
    first, *others = owners
    remark = f"{text} was taken from {first.value}"
    for other in others:
        remark += f"; {other.value} has one of that name too, whose keys may differ: {other.value}:{text}"
    return replace(parse(f"{first.value}:{text}"), remark=remark)


def unknown_model(name: str) -> InputError:
    """The error for a bare name that is neither built in nor in a library, with the closest names that are."""
    if isdir(name):
        return without_weights(name)
    meant = _other_form(name)
    if not meant and "/" in name:
        return UnknownModelError(f"expected a model's name or a path, got {name!r}, which is neither: check the path")
    specs = {built_in: built_in for built_in in MODELS}  # by bare names
    for library in installed():
        for known in names(library):
            specs.setdefault(known, f"{library.value}:{known}")
    hint = _hint([meant] if meant else (specs[known] for known in closest(name, specs)))
    missing = [library.value for library in LIBRARIES if library not in installed()]
    extras = f"; pip install 'convsim-init[{','.join(missing)}]' for more" if missing else ""
    return UnknownModelError(f"expected the name of a model, got {name!r}: {hint} run `convsim-init list`{extras}")


def _other_form(name: str) -> str | None:
    """The spec that is meant by ``module.function`` or by a name of the hub of Hugging Face, if it may be one."""
    module, _, function = name.rpartition(".")
    library = next((library for library in installed() if library.value == module), None)
    if all(part.isidentifier() for part in name.split(".")) and module and is_importable(module):
        return f"{module}:{function}" if library is None or function in names(library) else None
    is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not isdir(name.partition("/")[0])
    return f"{Source.HUB.value}:{name}" if is_hub_name else None


def _hint(alike: Iterable[str]) -> str:
    names = " or ".join(alike)
    return f"did you mean {names}? For all names" if names else "for all names"


def find_builder(library: Source, name: str) -> Callable[[Mapping[str, object]], torch.nn.Module]:
    """The function that builds a library's model from arguments, without pretrained weights.

    Raises:
        UnknownModelError: If the library has no such model, with the closest names.
        InputError: If the library cannot be imported.
    """
    if not has(library, name):
        hint = _hint(f"{library.value}:{known}" for known in closest(name, names(library)))
        raise UnknownModelError(
            f"expected the name of a model of {library.value}, got {name!r}: {hint} run "
            f"`convsim-init list '{library.value}:*'`"
        )
    registry = _load(library)
    if library is Source.TIMM:
        builder = partial(registry.create_model, name, pretrained=False)
    else:
        builder = registry.get_model_builder(name)
        # The backbones of detection and segmentation models would be downloaded if not declined, too.
        declined = {"weights", "weights_backbone"} & inspect.signature(builder).parameters.keys()
        builder = partial(builder, **dict.fromkeys(declined))
    return partial(_build, library, name, builder)


def _build(
    library: Source, name: str, builder: Callable[..., torch.nn.Module], arguments: Mapping[str, object]
) -> torch.nn.Module:
    given = {key: value for key, value in arguments.items() if key not in TRAINED[library]}
    with user_errors(f"{library.value}:{name}"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about defaults that torchvision is going to change
        return builder(**given)


@cache
def _load(library: Source) -> ModuleType:
    with import_errors(library.value):
        return import_module("torchvision.models" if library is Source.TORCHVISION else library.value)


@contextmanager
def import_errors(package: str) -> Iterator[None]:
    """Turn errors of a library's import into an `InputError`, with advice if torchvision does not fit torch."""
    try:
        yield
    except Exception as error:  # a library that was built for another torch fails in many ways
        first: BaseException = error
        while first.__cause__ is not None:  # transformers raises an error that does not give the reason
            first = first.__cause__
        cause = f"{type(first).__name__}: {first}"
        if "torchvision" not in cause or isinstance(first, ModuleNotFoundError):
            raise InputError(f"cannot import {package}: {cause}; pip install --upgrade {package}") from error
        own, of_torch = (installed_version(name) or "of an unknown version" for name in ("torchvision", "torch"))
        raise InputError(
            f"torchvision {own} does not fit torch {of_torch} ({cause}): install both "
            f"from the same place, for the same CUDA version or for the CPU, as pytorch.org/get-started shows"
        ) from error
