"""Models that a function or class of the user's own makes, in a module or in a Python file.

Naming one runs the user's code, that of the module and that of the factory, and nothing else.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from difflib import get_close_matches
from importlib import import_module, invalidate_caches
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from convsim_init.errors import InputError
from convsim_init.models.spec import Source, Spec

if TYPE_CHECKING:
    import torch

# What the files of a folder have imported from it. Other folders may hold other modules of the same names.
_beside: dict[Path, dict[str, ModuleType]] = {}
_MISSING = object()


def check(spec: Spec) -> None:
    """Refuse a file or a top-level module that is not there, without running anything.

    Raises:
        InputError: With the closest file names.
    """
    if spec.source is Source.FILE:
        path = Path(spec.place)
        if path.is_file():
            return
        known = [file.name for file in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise InputError(f"expected a Python file to read, got {spec.place!r}, which is none{_alike(path.name, known)}")
    top = spec.place.partition(".")[0]
    invalidate_caches()
    with _on_path(Path.cwd()):
        if top not in sys.modules and find_spec(top) is None:
            raise InputError(
                f"expected a module that can be imported, got {spec.place!r}: {top!r} is neither in this folder nor "
                f"installed"
            )


@contextmanager
def importable(spec: Spec) -> Iterator[None]:
    """Let the user's code import what lies in the working folder or beside its file, and print to stderr only."""
    if spec.source is Source.MODULE:
        with _on_path(Path.cwd()), redirect_stdout(sys.stderr):
            yield
        return
    folder = Path(spec.place).resolve().parent
    for other in _beside.keys() - {folder}:
        for name in _beside[other]:
            sys.modules.pop(name, None)
    beside = _beside.setdefault(folder, {})
    sys.modules.update(beside)
    known = set(sys.modules)
    try:
        with _on_path(folder), redirect_stdout(sys.stderr):
            yield
    finally:
        new = {name: sys.modules[name] for name in sys.modules.keys() - known if name.partition(".")[0] not in known}
        beside.update({name: module for name, module in new.items() if _lies_in(folder, name, module)})


def find(spec: Spec) -> Callable[..., object]:
    """The factory; to be called within `importable`.

    Raises:
        InputError: If its module cannot be imported, or has no such factory.
    """
    found: object = _file(spec) if spec.source is Source.FILE else _module(spec)
    for part in spec.name.split("."):
        owner = found
        with _telling(f"{spec.place} raised"):
            found = getattr(owner, part, _MISSING)
        if found is _MISSING:
            hint = _alike(part, [name for name in vars(owner) if not name.startswith("_")])
            raise InputError(f"expected the name of a function or class in {spec.place}, got {spec.name!r}{hint}")
    import torch

    if isinstance(found, torch.nn.Module) or not callable(found):
        what = "a model" if isinstance(found, torch.nn.Module) else f"{type(found).__name__}, which cannot be called"
        raise InputError(f"{spec.text}: expected a function or class, got {what}: name a function that returns a model")
    return found


def build(spec: Spec, factory: Callable[..., object], arguments: Mapping[str, object]) -> torch.nn.Module:
    """The model that the factory makes; to be called within `importable`.

    Raises:
        InputError: If it takes other arguments, raises, or returns anything but a module.
    """
    import torch

    _check_arguments(spec.text, factory, arguments)
    with _telling(f"{spec.text} raised"):
        model = factory(**arguments)
    if not isinstance(model, torch.nn.Module):
        got = "None" if model is None else f"type {type(model).__name__}"
        raise InputError(f"{spec.text}: expected a torch.nn.Module, got {got}: return the model alone")
    return model


def _file(spec: Spec) -> ModuleType:
    path = Path(spec.place).resolve()
    # An edited file is another module; the same one is not run twice, for the sake of what it may register.
    identity = f"{path}\n{path.stat().st_mtime_ns}"
    name = "convsim_init_file_" + hashlib.sha256(os.fsencode(identity)).hexdigest()[:16]
    if name in sys.modules:
        return sys.modules[name]
    module_spec = spec_from_file_location(name, path)
    assert module_spec is not None  # it has one: its name ends in .py
    assert module_spec.loader is not None
    module = sys.modules[name] = module_from_spec(module_spec)
    try:
        with _telling(f"{spec.place} raised"):
            module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _module(spec: Spec) -> ModuleType:
    try:
        with _telling(f"importing {spec.place} raised"):
            return import_module(spec.place)
    except InputError as error:
        missing = error.__cause__
        if isinstance(missing, ModuleNotFoundError) and f"{spec.place}.".startswith(f"{missing.name}."):
            raise InputError(
                f"expected a module that can be imported, got {spec.place!r}: there is no {missing.name!r}"
            ) from missing
        raise


@contextmanager
def _telling(what: str) -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit) as error:
        raise InputError(f"{what} {type(error).__name__}: {error}; --debug shows where") from error


def _check_arguments(text: str, factory: Callable[..., object], arguments: Mapping[str, object]) -> None:
    try:
        signature = inspect.signature(factory)
    except (ValueError, TypeError):  # some that are not written in Python have none
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        plain = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
        taken = " ".join(str(signature.replace(parameters=plain, return_annotation=signature.empty)).split())
        taken = taken if len(taken) <= 200 else taken[:197] + "..."
        raise InputError(
            f"{text}: expected arguments that fit {taken}, got {', '.join(arguments) or 'none'}: {error}"
        ) from error


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    before = sys.path.copy()
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = before


def _lies_in(folder: Path, name: str, module: ModuleType) -> bool:
    """Whether it is a module, or in a package, that stands in the folder itself; an environment below it is not."""
    top = folder / name.partition(".")[0]
    place = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), None)
    return isinstance(place, str) and (Path(place) == top.with_suffix(".py") or Path(place).is_relative_to(top))


def _alike(name: str, known: list[str]) -> str:
    alike = get_close_matches(name, known)
    return f": did you mean {' or '.join(alike)}?" if alike else ""
