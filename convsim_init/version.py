"""Versions of this package and of others."""

from importlib.metadata import PackageNotFoundError, version


def installed_version(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


__version__ = installed_version("convsim-init") or "0+source"  # a source tree alone is not installed
