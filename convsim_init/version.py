"""Versions of this package and of others."""

import sys
from importlib.metadata import PackageNotFoundError, version


def installed_version(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    # torch and torchvision, once loaded, say for which CUDA they were built; the names of their wheels may not.
    loaded = getattr(sys.modules.get(f"{package}.version"), "__version__", None)
    try:
        return str(loaded) if loaded else version(package)
    except PackageNotFoundError:
        return None


__version__ = installed_version("convsim-init") or "0+source"  # a source tree alone is not installed
