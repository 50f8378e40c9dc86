"""Weights whose filters are multiples of others: by what factor a class uses each, and values that tell."""

from __future__ import annotations

import torch
from torch import Tensor

from convsim_init.layers.weights import describe_mismatch, to_float64


def probes_like(stored: Tensor) -> tuple[Tensor, Tensor]:
    """Two weights without zeros: of one sign, and of both by turns."""
    # The device is named, as under `torch.device("meta")` the numbers would have no data.
    probe = (1 + torch.rand(stored.shape, generator=torch.Generator().manual_seed(0), device="cpu")).to(stored)
    signs = 1 - 2 * (torch.arange(probe.numel(), device=probe.device) % 2)
    return probe, probe * signs.view(probe.shape).to(probe)


def is_multiple(used: Tensor, variable: Tensor) -> bool:
    """Whether each filter that is used is a multiple of one."""
    return describe_mismatch("class", slopes_of(used, variable) * variable, used) is None


def slopes_of(used: Tensor, variable: Tensor) -> Tensor:
    """For each filter the factor by which one is used, ``[M, 1, ...]``."""
    # The s with the least |used - s v|^2 is <used, v> / <v, v>.
    axes = tuple(range(1, used.dim()))
    return ratios((to_float64(used) * variable).sum(axes, keepdim=True), variable.square().sum(axes, keepdim=True))


def norms_of(weight: Tensor) -> Tensor:
    """The norms of filters, ``[M, 1, ...]``."""
    norms: Tensor = torch.linalg.vector_norm(to_float64(weight), dim=tuple(range(1, weight.dim())), keepdim=True)
    return norms


def ratios(above: Tensor, below: Tensor) -> Tensor:
    """One over the other, as if that were 1 where it is 0."""
    return above / torch.where(below == 0, 1, below)
