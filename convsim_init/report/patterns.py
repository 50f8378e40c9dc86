"""Selecting names, of layers or of keys, by shell patterns. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase

from convsim_init.errors import InputError
from convsim_init.report.text import alternatives, quoted, shown


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name is one of the shell patterns or matches one, where upper and lower case differ."""
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)  # a name may have brackets


def check_list(option: str, patterns: Sequence[str]) -> None:
    """Refuse what is no list of patterns."""
    # A string is a sequence of patterns, too, of one letter each.
    if isinstance(patterns, str):
        raise InputError(f"{option}: expected a list of patterns, got the string {patterns!r}; write [{patterns!r}]")
    if not isinstance(patterns, Collection) or not all(isinstance(pattern, str) for pattern in patterns):
        raise InputError(f"{option}: expected a list of patterns such as ['layer4.*'], got {shown(repr(patterns))}")


def check_patterns(
    option: str, patterns: Sequence[str], names: Collection[str], *, kind: str = "convolution", refusal: str = ""
) -> None:
    """Refuse what is no list of patterns, and a pattern that matches none of the names, which are of that kind.

    The error begins with ``refusal`` and offers the nearest names or, for a module's name, the pattern of its parts.
    """
    check_list(option, patterns)
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            inside = f"{pattern}.*"
            is_module = any(matches(name, [inside]) for name in names)
            nearest = f"did you mean {quoted(inside)}?" if is_module else alternatives(pattern, names, kind)
            raise InputError(f"{refusal or f'{option}: no {kind} matches'} {quoted(pattern)}; {nearest}")
