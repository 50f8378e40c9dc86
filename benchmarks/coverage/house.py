"""Counts what the house rules of CONTRIBUTING.md bound: ``python -m benchmarks.coverage.house``.

Which folder may import which is the table in ``tests/system/test_package.py``; docstrings are for ruff to see to.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST_FILES, MOST_AT_THE_TOP = 12, 10
COMMENTED = ("convsim_init/backends", "convsim_init/optim")
COMMENTS = {
    ".py": re.compile(r"^ *#.*$", re.MULTILINE),
    ".c": re.compile(r"^ *(?://[^\n]*|/\*(?:(?!\*/).)*\*/ *)$", re.MULTILINE | re.DOTALL),
}


def sources(folder: str) -> list[Path]:
    """Source files of a folder and of those in it."""
    return sorted(path for suffix in ("py", "c") for path in (ROOT / folder).rglob(f"*.{suffix}"))


def file_counts() -> dict[str, int]:
    """Number of source files that each folder of code holds itself."""
    counts: dict[str, int] = {}
    for path in (path for top in ("convsim_init", "cli", "benchmarks") for path in sources(top)):
        folder = path.parent.relative_to(ROOT).as_posix()
        counts[folder] = counts.get(folder, 0) + 1
    return counts


def crowded_folders() -> dict[str, int]:
    """Folders that hold more files than the rules allow."""
    return {
        folder: count
        for folder, count in file_counts().items()
        if count > (MOST_AT_THE_TOP if folder == "convsim_init" else MOST_FILES)
    }


def line_counts() -> dict[str, int]:
    """Number of lines of each source file of the library and the command."""
    files = sources("convsim_init") + sources("cli")
    return {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in files}


def comment_share(folder: str) -> float:
    """Share of a folder's lines that are a comment and nothing else."""
    comments = lines = 0
    for path in sources(folder):
        text = path.read_text(encoding="utf-8")
        comments += sum(len(comment.splitlines()) for comment in COMMENTS[path.suffix].findall(text))
        lines += len(text.splitlines())
    return comments / lines


def main() -> None:
    """Print the counts, each beside its bound."""
    files, lines = file_counts(), line_counts()
    longest = max(lines, key=lambda name: lines[name])
    for folder, count in files.items():
        most = MOST_AT_THE_TOP if folder == "convsim_init" else MOST_FILES
        print(f"{folder + '/':40} {count:6} files, at most {most}")
    print(f"{'library, command and C':40} {sum(lines.values()):6} lines, the goal is at most 8000")
    print(f"{'longest: ' + longest:40} {lines[longest]:6} lines")
    for folder in COMMENTED:
        print(f"{'full-line comments in ' + folder + '/':40} {comment_share(folder):6.1%} of lines, the goal is 2 %")


if __name__ == "__main__":
    main()
