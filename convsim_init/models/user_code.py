"""Importing the user's modules and files, which runs their code."""

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

# For each folder the modules that its files have imported from it. Several folders may have modules of one name.
_folder_modules: dict[Path, dict[str, ModuleType]] = {}


def is_importable(module: str) -> bool:
    """Whether the top package of a module can be found from the working folder, without running any code."""
    top = module.partition(".")[0]
    # Importers cache the contents of folders, and would miss a file that was just written.
    invalidate_caches()
    with _on_path(Path.cwd()):
        return top in sys.modules or find_spec(top) is not None


@contextmanager
def import_context(file: str | None = None) -> Iterator[None]:
    """Context in which code can import what lies beside a file, or else in the working folder, and prints to stderr.

    It sees no command-line arguments, because a file that parses them would take them for its own.
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
    for other in _folder_modules.keys() - {folder}:
        for name in _folder_modules[other]:
            sys.modules.pop(name, None)
    modules = _folder_modules.setdefault(folder, {})
    sys.modules.update(modules)
    known = set(sys.modules) - modules.keys()
    try:
        yield
    finally:
        # Without modules of a package that other code has imported, wherever that lies.
        new = {name: sys.modules[name] for name in sys.modules.keys() - known if name.partition(".")[0] not in known}
        modules.update({name: module for name, module in new.items() if _lies_in(folder, name, module)})


@contextmanager
def user_errors(what: str) -> Iterator[None]:
    """Turn whatever the user's code raises, except an interrupt, into an `InputError` of one line."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # including SystemExit
        relative = isinstance(error, ImportError) and "relative import" in str(error)
        hint = "; name it with its package, as package.module:function" if relative else ""
        raise InputError(f"{what} raised {error_text(error)}{hint}") from error


def load_module(name: str) -> ModuleType:
    """Import the module of that name, or raise an `InputError` that says why not; call it within `import_context`."""
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
    """Import a file as a module of a unique name; call it within `import_context`.

    A file is run again only if it was edited, because it may register something.

    Raises:
        InputError: If the file cannot be read or its code fails.
    """
    path = Path(file).resolve()
    with user_errors(file):
        identity = f"{path}\n{path.stat().st_mtime_ns}"
        name = "convsim_init_file_" + hashlib.sha256(os.fsencode(identity)).hexdigest()[:16]
        if name in sys.modules:
            return sys.modules[name]
        spec = spec_from_file_location(name, path)
        assert spec is not None  # because the file's name ends in .py
        assert spec.loader is not None
        # Before it runs, because dataclasses and pickle look up the module of a class there.
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
        os.chdir(working_folder)  # the user's code may have changed it


def _lies_in(folder: Path, name: str, module: ModuleType) -> bool:
    """Whether the module or its top package lies directly in the folder, unlike those of an environment below it."""
    top = folder / name.partition(".")[0]
    # Not by getattr, because a lazy module may then import something that is not installed.
    attributes = getattr(module, "__dict__", {})
    place = attributes.get("__file__") or next(iter(attributes.get("__path__", ())), None)
    return isinstance(place, str) and (Path(place) == top.with_suffix(".py") or Path(place).is_relative_to(top))
