"""Names and long texts as people read them. Names may have any characters, and any number of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import get_close_matches

from convsim_init.errors import InputError, RunError

NAME, PATH, ERROR = 80, 300, 500  # characters shown of a layer's name or a key, of a path, and of an error


def printable(text: str) -> str:
    """The text on one line, with characters that do not print escaped as `repr` does.

    Controls, bidirectional overrides and lone surrogates would otherwise move a terminal's cursor,
    forge the row of a table or fail to be encoded.
    """
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def has_surrogates(text: str) -> bool:
    """Whether some letters stand for bytes that are no text, and cannot be written as UTF-8."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def shortened(text: str, length: int = NAME) -> str:
    """The text, without its middle if it has more than ``length`` characters."""
    if len(text) <= length:
        return text
    end = (length - 3) // 2
    return text[: length - 3 - end] + "..." + text[-end:]


def shown(name: str, length: int = NAME) -> str:
    """A name as one short piece of a line."""
    return shortened(printable(name), length) or "''"


def quoted(value: object) -> str:
    """A name, or whatever is there in its place, in quotation marks."""
    return shortened(repr(value))


def error_text(error: BaseException) -> str:
    """The kind of an error and its message, which may hold a whole tensor, on one short line."""
    try:
        message = str(error)
    except Exception:  # whatever the `__str__` of a user's class raises
        message = ""
    return shortened(" ".join(f"{type(error).__name__}: {message}".split()).removesuffix(":"), ERROR)


def error_line(error: Exception) -> str:
    """An error as the command's user reads it; with its kind, and how to see more, where other code raised it."""
    if not isinstance(error, (InputError, RunError)):
        return f"{error_text(error)} (--debug shows where)"
    cause = error.__cause__
    only_quotes = cause is not None and str(error).endswith(f" raised {error_text(cause)}")
    return f"{error}; --debug shows where" if only_quotes else str(error)


def layer_name(name: str) -> str:
    """The name of a layer, which is empty where the model itself is the layer."""
    return shown(name) if name else "(the model itself)"


def quoted_layer(name: str) -> str:
    """The name of a layer in quotation marks, without which ``0`` would read as a number; see `layer_name`."""
    return quoted(name) if name else layer_name(name)


def convolutions(number: int) -> str:
    """How many convolutions there are: ``1 convolution``, ``3 convolutions``."""
    return f"{number} convolution{'' if number == 1 else 's'}"


def some(names: Iterable[str], count: int = 4) -> str:
    """The first few of several names, already `shown`: ``a, b and 3 more``."""
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message that refuses a name, ``: did you mean a or b?``, or nothing; offered with the prefix."""
    # Names are shortened because the search takes a time that is quadratic in their length.
    written = {other.casefold(): other for other in map(shown, known)}
    similar = get_close_matches(shown(name).casefold(), written)
    return f": did you mean {' or '.join(prefix + written[other] for other in similar)}?" if similar else ""


def alternatives(name: str, known: Collection[str], kind: str = "convolution") -> str:
    """The end of a message that refuses a name of that kind, ``the convolutions are 'a', 'b': did you mean a?``."""
    subject = f"{kind} is" if len(known) == 1 else f"{kind}s are"
    return f"the {subject} {some(map(quoted_layer, known))}{did_you_mean(name, known)}"
