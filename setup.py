"""One wheel a platform for every Python: what is compiled is a plain shared library, which ctypes loads by its name."""

import os
import shutil

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

MOVES_UNALIGNED = ["-DMOVES_UNALIGNED", "-Wa,-muse-unaligned-vector-move"]  # see step.c


class _SharedLibrary(build_ext):
    def finalize_options(self) -> None:
        super().finalize_options()
        if os.name == "nt" and self.compiler is None and shutil.which("gcc"):
            self.compiler = "mingw32"  # that is gcc: Microsoft's compiler has no vectors as in step.c

    def build_extension(self, ext: Extension) -> None:
        plain = ext.extra_compile_args
        if self.compiler.compiler_type == "mingw32":
            try:
                ext.extra_compile_args = plain + MOVES_UNALIGNED
                return super().build_extension(ext)
            except CompileError:  # by an assembler older than binutils 2.38, or that of clang
                ext.extra_compile_args = plain
        return super().build_extension(ext)

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def get_libraries(self, ext: Extension) -> list[str]:
        return ext.libraries  # on Windows that of Python would be added, which is not needed


class _PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build_ext": _SharedLibrary, "bdist_wheel": _PlatformWheel})
