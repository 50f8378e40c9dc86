"""The version, from the installed package or, when run from a source tree, from its pyproject.toml."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("convsim-init")
except PackageNotFoundError:
    __version__ = "0+source"
