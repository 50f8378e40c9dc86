"""Importing modules and files of the user's own, which runs their code."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from importlib import import_module, invalidate_caches
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from convsim_init.errors import InputError
from convsim_init.report.text import error_text

# What the files of a folder have imported from it. Other folders may hold other modules of the same names.
_beside: dict[Path, dict[str, ModuleType]] = {}


def is_importable(module: str) -> bool:
    """Whether the package that a module is in can be found from the working folder; nothing is run to tell."""
    top = module.partition(".")[0]
    # Importers remember what folders held: a file that was just written would not be found.
    invalidate_caches()
    with _on_path(Path.cwd()):
        return top in sys.modules or find_spec(top) is not None


@contextmanager
def import_context(file: str | None = None) -> Iterator[None]:
    """Let code import what lies beside a file, or else in the working folder, and print to stderr only.

    It sees no arguments of ours: a file that parses the command line would take them for its own.
    """
    folder = Path(file).resolve().parent if file else Path.cwd()
    arguments = sys.argv
    with _modules_beside(folder) if file else nullcontext(), _on_path(folder), redirect_stdout(sys.stderr):
        sys.argv = [file or arguments[0]]
        try:
            yield
        finally:
            sys.argv = arguments


@contextmanager
def _modules_beside(folder: Path) -> Iterator[None]:
    for other in _beside.keys() - {folder}:
        for name in _beside[other]:
            sys.modules.pop(name, None)
    beside = _beside.setdefault(folder, {})
    sys.modules.update(beside)
    known = set(sys.modules) - beside.keys()
    try:
        yield
    finally:
        # A module of a package that others have imported is not the folder's, wherever it lies.
        new = {name: sys.modules[name] for name in sys.modules.keys() - known if name.partition(".")[0] not in known}
        beside.update({name: module for name, module in new.items() if _lies_in(folder, name, module)})


@contextmanager
def user_errors(what: str) -> Iterator[None]:
    """Turn whatever code of others raises, but an interrupt, into an `InputError` of one line."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, and whatever else a user's code derives from it
        relative = isinstance(error, ImportError) and "relative import" in str(error)
        hint = "; name it with its package, as package.module:function" if relative else ""
        raise InputError(f"{what} raised {error_text(error)}{hint}") from error


def load_module(name: str) -> ModuleType:
    """The module of that name, or an `InputError` that says why not; to be called within `import_context`."""
    try:
        with user_errors(f"importing {name}"):
            return import_module(name)
    except InputError as error:
        missing = error.__cause__
        if isinstance(missing, ModuleNotFoundError) and f"{name}.".startswith(f"{missing.name}."):
            raise InputError(
                f"expected a module that can be imported, got {name!r}: there is no {missing.name!r}"
            ) from missing
        raise


def load_file(file: str) -> ModuleType:
    """The file as a module, under a name that clashes with nothing; to be called within `import_context`.

    The same file is not run twice, for the sake of what it may register; an edited one is another.

    Raises:
        InputError: If it cannot be read or running it fails.
    """
    path = Path(file).resolve()
    with user_errors(file):
        identity = f"{path}\n{path.stat().st_mtime_ns}"
        name = "convsim_init_file_" + hashlib.sha256(os.fsencode(identity)).hexdigest()[:16]
        if name in sys.modules:
            return sys.modules[name]
        spec = spec_from_file_location(name, path)
        assert spec is not None  # its name ends in .py
        assert spec.loader is not None
        # Before it runs, as in an import: dataclasses and pickle look a class's module up there.
        module = sys.modules[name] = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    before, working_folder = sys.path.copy(), Path.cwd()
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = before
        os.chdir(working_folder)  # relative paths go on meaning what they meant


def _lies_in(folder: Path, name: str, module: ModuleType) -> bool:
    """Whether it is a module, or in a package, that stands in the folder itself; an environment below it is not."""
    top = folder / name.partition(".")[0]
    # As it stands: one that is lazy, when asked for an attribute, would import what may not be installed.
    attributes = getattr(module, "__dict__", {})
    place = attributes.get("__file__") or next(iter(attributes.get("__path__", ())), None)
    return isinstance(place, str) and (Path(place) == top.with_suffix(".py") or Path(place).is_relative_to(top))
