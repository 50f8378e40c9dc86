"""Arguments of a model as a user types them: ``KEY=VALUE``. Nothing is evaluated but literals."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from convsim_init.errors import InputError
from convsim_init.report.text import quoted

MAX_LENGTH = 1000  # far more than a value needs, and too short for brackets to nest deep enough to do harm
OWN_OPTIONS = {"num_classes": "--num-classes", "in_chans": "--in-chans", "seed": "--seed"}
WORDS = {"true": True, "false": False, "none": None, "null": None}
OPENERS = tuple("[({'\"")


def parse_arguments(texts: Sequence[str]) -> dict[str, object]:
    """Arguments by name, from texts ``KEY=VALUE``.

    A value is a Python literal such as ``3``, ``0.5``, ``[1, 2]`` or ``'text'``; ``true``, ``false``, ``none`` and
    ``null`` in any case; and anything else is text as it stands.

    Raises:
        InputError: If a text is not of that form, names an argument twice or one that has an option of its own, or its
            value opens a bracket or quote and is no literal.
    """
    arguments: dict[str, object] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"--model-arg: expected KEY=VALUE with the name of an argument as KEY, got {quoted(text)}")
        if key in OWN_OPTIONS:
            raise InputError(f"--model-arg: {key} has an option of its own: use {OWN_OPTIONS[key]}")
        if key in arguments:
            raise InputError(f"--model-arg: expected each argument once, got {quoted(key)} twice: leave one out")
        arguments[key] = _value(key, value)
    return arguments


def _value(key: str, text: str) -> object:
    if len(text) > MAX_LENGTH:
        raise InputError(
            f"--model-arg: expected a value of at most {MAX_LENGTH} characters for {quoted(key)}, got {len(text)}: "
            f"write a factory that knows it"
        )
    if text.strip().lower() in WORDS:
        return WORDS[text.strip().lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        if text.lstrip().startswith(OPENERS):
            raise InputError(
                f"--model-arg: expected a Python literal such as [1, 2] or 'text' for {quoted(key)}, got "
                f"{quoted(text)}: put quotes around each text in it"
            ) from error
        return text
