"""An architecture of the census."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[Any, ...] | Mapping[str, Any]  # the arguments of a forward pass


@dataclass(frozen=True)
class Architecture:
    """A model that can be built without a download, and run.

    Attributes:
        name: With the source's name before it, such as ``"timm:resnet18"``.
        build: Builds it, with weights from torch's generator.
        inputs: Arguments of a forward pass of the model, small ones first; the first that it takes are used.
        outline: As `build`, but on the device of the context, such as ``meta``. Default: `build`.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], Iterable[Inputs]]
    outline: Callable[[], nn.Module] | None = None


def noise(*shape: int) -> Tensor:
    """Normal numbers, the same at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
