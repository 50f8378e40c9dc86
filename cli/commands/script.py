"""A Python script of the user's, run in this process as Python itself would run it."""

from __future__ import annotations

import builtins
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader, SourcelessFileLoader
from os.path import isfile
from pathlib import Path
from pkgutil import get_importer
from types import CodeType, ModuleType, TracebackType
from typing import cast

from convsim_init.errors import InputError
from convsim_init.report.text import did_you_mean


class Script:
    """A script, module, archive or folder that `python NAME ARGUMENTS` or `python -m NAME ARGUMENTS` runs.

    Raises:
        InputError: If there is no such file. Whether there is such a module turns out when it is executed.
    """

    def __init__(self, name: str, arguments: Sequence[str], *, is_module: bool) -> None:
        self._name, self._arguments, self._is_module = name, arguments, is_module
        self._path = Path(name).absolute()
        self._is_archive = not is_module and get_importer(str(self._path)) is not None  # or a folder with `__main__.py`
        if not (is_module or self._is_archive or isfile(self._path)):
            alike = did_you_mean(self._path.name, (file.name for file in self._path.parent.glob("*.py")))
            advice = alike or ": check the path"
            raise InputError(f"expected a Python file to run, got {name!r}, which is none{advice}")
        if self._path.suffix == ".ipynb":  # JSON, much of which Python would run
            advice = "save it as one, for instance by `jupyter nbconvert --to script`"
            raise InputError(f"expected a Python file to run, got {name!r}, a notebook: {advice}")

    def execute(self) -> None:
        """Run it as the module ``__main__``, which it stays until Python ends; errors that it raises are passed on."""
        sys.argv = [self._name, *self._arguments]
        # The first entry of the path is this command's own, and gives way; with safe_path there is none.
        has_entry = not getattr(sys.flags, "safe_path", False)
        if self._is_archive or has_entry:
            folder = self._path if self._is_archive else Path.cwd() if self._is_module else self._path.resolve().parent
            sys.path[:has_entry] = [str(folder)]
        code, names = self._load()
        # It is not put back afterwards: threads and exit handlers may pickle classes of the script.
        main = sys.modules["__main__"] = ModuleType("__main__")
        vars(main).update(names, __builtins__=builtins)
        exec(code, vars(main))

    def _load(self) -> tuple[CodeType, dict[str, object]]:
        """The script's code, and the names that Python defines in it."""
        if self._is_module or self._is_archive:  # Python's debugger, pdb, does the same
            if self._is_archive:
                _, spec, code = runpy._get_main_module_details()  # type: ignore[attr-defined]
            else:
                _, spec, code = runpy._get_module_details(self._name)  # type: ignore[attr-defined]
                sys.argv[0] = spec.origin
            names = {"__file__": spec.origin, "__loader__": spec.loader, "__package__": spec.parent, "__spec__": spec}
            return code, names
        path = str(self._path)
        loader: SourceFileLoader | SourcelessFileLoader
        if self._path.suffix == ".pyc":
            loader = SourcelessFileLoader("__main__", path)
            code = cast(CodeType, loader.get_code("__main__"))
        else:
            loader = SourceFileLoader("__main__", path)
            code = loader.source_to_code(loader.get_data(path), path)  # get_code would write to __pycache__
        return code, {"__file__": path, "__loader__": loader}

    def is_missing(self, error: BaseException) -> bool:
        """Whether an error of `execute` means that there is no such module, or nothing to run in an archive."""
        own, last = _in_script(error)
        return isinstance(error, ImportError) and own is None and last == "runpy"  # the module that looks for it

    def show(self, error: BaseException) -> None:
        """Show an error of `execute` as Python does, by the hook that the script may have set."""
        own, _ = _in_script(error)
        if own is None and self._is_module:  # raised by a package that is imported before the module
            own = error.__traceback__
        try:
            sys.excepthook(type(error), error.with_traceback(own), own)
        except Exception as in_hook:  # its context is the error that the hook was called for
            sys.__excepthook__(type(in_hook), in_hook, in_hook.__traceback__)


def _in_script(error: BaseException) -> tuple[TracebackType | None, str]:
    """The traceback from the script's own code on, if that was reached, and the name of the module before it."""
    own, last = error.__traceback__, ""
    while own is not None and own.tb_frame.f_globals.get("__name__") != "__main__":
        last, own = own.tb_frame.f_globals.get("__name__", ""), own.tb_next
    return own, last
