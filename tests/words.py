"""What this system says of errors, in its own words."""

from pathlib import Path


def _said(path: Path) -> str:
    try:
        path.stat()
    except OSError as error:
        return error.strerror
    raise AssertionError


MISSING = _said(Path(f"{__file__}.gone"))
