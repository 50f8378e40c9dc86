"""Weights whose filters are multiples of the stored ones: the factor of each filter, and values that show it."""

from __future__ import annotations

import torch
from torch import Tensor

from convsim_init.layers.weights import describe_mismatch, to_float64


def probes_like(stored: Tensor) -> tuple[Tensor, Tensor]:
    """Two weights of that shape without zeros: a positive one, and one of alternating signs."""
    # The device is given, because under `torch.device("meta")` the numbers would have no data.
    probe = (1 + torch.rand(stored.shape, generator=torch.Generator().manual_seed(0), device="cpu")).to(stored)
    signs = 1 - 2 * (torch.arange(probe.numel(), device=probe.device) % 2)
    return probe, probe * signs.view(probe.shape).to(probe)


def is_multiple(used: Tensor, variable: Tensor) -> bool:
    """Whether each filter of the used weight is a multiple of the same filter of the variable."""
    return describe_mismatch("class", slopes_of(used, variable) * variable, used) is None


def slopes_of(used: Tensor, variable: Tensor) -> Tensor:
    """The factor of each filter, ``[M, 1, ...]``: that which brings the variable nearest to the used weight."""
    # The s with the least |used - s v|^2 is <used, v> / <v, v>.
    axes = tuple(range(1, used.dim()))
    return ratios((to_float64(used) * variable).sum(axes, keepdim=True), variable.square().sum(axes, keepdim=True))


def norms_of(weight: Tensor) -> Tensor:
    """The norm of each filter, ``[M, 1, ...]``."""
    norms: Tensor = torch.linalg.vector_norm(to_float64(weight), dim=tuple(range(1, weight.dim())), keepdim=True)
    return norms


def ratios(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotients, with 1 in place of a denominator of 0."""
    return numerator / torch.where(denominator == 0, 1, denominator)
