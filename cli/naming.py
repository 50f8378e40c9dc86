"""File names of many runs from one pattern: ``inits/{model}-s{seed}.safetensors``."""

from __future__ import annotations

import re
from pathlib import Path
from string import Formatter

from convsim_init.errors import InputError
from convsim_init.files import SUFFIXES

FIELDS = ("model", "seed")


def fill(pattern: str, *, model: str, seed: int | None) -> str:
    """The pattern with ``{model}`` and ``{seed}`` filled in; ``{{`` and ``}}`` stand for braces.

    Args:
        pattern: A path.
        model: Spec of the model or name of the file, of which `file_safe` is filled in.
        seed: Of its drawn weights; None if none are drawn.

    Raises:
        InputError: If other things stand in braces, or ``{seed}`` where nothing is drawn.
    """
    values = {"model": file_safe(model), "seed": seed}
    filled = []
    for text, field in _parts(pattern):
        filled.append(text)
        if field is not None:
            if values[field] is None:
                raise InputError(f"{model!r} has its weights already and no seed: take {{seed}} out of {pattern!r}")
            filled.append(str(values[field]))
    return "".join(filled)


def file_safe(model: str) -> str:
    """A spec as part of a file name: ``timm:resnet18`` is ``timm-resnet18``, ``path/to/net.py:small`` ``net-small``.

    Of a path its last part counts, without the suffix; of what is left, letters, digits, ``.``, ``_`` and ``-`` stay.
    """
    if Path(model).suffix in SUFFIXES:
        text = Path(model).stem
    else:
        place, colon, name = model.rpartition(":")
        text = f"{Path(place).name.removesuffix('.py')}-{name}" if colon else name
    return re.sub(r"[^\w.-]+", "-", text).strip(".-") or "model"


def _parts(pattern: str) -> list[tuple[str, str | None]]:
    """Each stretch of plain text, and the field that follows it."""
    try:
        parts = list(Formatter().parse(pattern))
    except ValueError:
        parts = [("", "", "", None)]
    if any(field is not None and (field not in FIELDS or spec or change) for _, field, spec, change in parts):
        raise InputError(
            f"expected {{model}} and {{seed}} alone in braces, got {pattern!r}: write {{{{ and }}}} for braces"
        )
    return [(text, field) for text, field, _, _ in parts]
