"""What a FILE or a MODEL on the command line stands for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from convsim_init.errors import InputError
from convsim_init.files import SUFFIXES, check_source
from convsim_init.models import UnknownModelError, build_model, catalog

if TYPE_CHECKING:
    import torch


def is_file(spec: str) -> bool:
    """Whether it names a checkpoint, by its suffix, and not a model."""
    return Path(spec).suffix in SUFFIXES


def check_source_or_model(spec: str) -> None:
    """Refuse what is neither a file that can be read nor a model that can be built, without torch."""
    if is_file(spec):
        check_source(spec)
        return
    try:
        catalog.find(spec)
    except UnknownModelError:
        if not Path(spec).exists():
            raise
        raise InputError(
            f"expected a file name ending in {', '.join(SUFFIXES)} or a model's name, got {spec!r}: rename it"
        ) from None


def load(spec: str, seed: int | None) -> torch.nn.Module | Mapping[str, torch.Tensor]:
    """The state dict in that file, or the model of that name."""
    if not is_file(spec):
        return build_model(spec, seed=seed or 0)
    from convsim_init.reading import read_state_dict

    return read_state_dict(spec)
