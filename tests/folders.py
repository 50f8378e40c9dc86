"""What stands in a folder before and after something is written there."""

from pathlib import Path

OLD = b"the file that was there"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
