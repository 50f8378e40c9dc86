"""One wheel a platform for every Python: what is compiled is a plain shared library, which ctypes loads by its name."""

import os
import shutil

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class _SharedLibrary(build_ext):
    def finalize_options(self) -> None:
        super().finalize_options()
        if os.name == "nt" and self.compiler is None and shutil.which("gcc"):
            self.compiler = "mingw32"  # that is gcc: Microsoft's compiler has no vectors as in step.c
            for extension in self.extensions:
                extension.extra_compile_args += ["-DUNALIGNED", "-Wa,-muse-unaligned-vector-move"]  # see step.c

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def get_libraries(self, ext: Extension) -> list[str]:
        return []  # on Windows that of Python, which it does not need


class _PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build_ext": _SharedLibrary, "bdist_wheel": _PlatformWheel})
