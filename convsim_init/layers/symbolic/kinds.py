"""What a call of a module or function counts as on the path from a layer to the next."""

from __future__ import annotations

import re

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from convsim_init.layers import tree
from convsim_init.layers.forward.code import is_from_library, names_of

NORMALIZATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
NAMED = re.compile(r"(?<!No)(?<!FrozenBatch)Norm(alization)?(?![a-z]|Free)")  # LayerNorm2d, but not NormalNoise
USERS = (_ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase)
USING = {f"conv{kind}{rank}d" for kind in ("", "_transpose") for rank in (1, 2, 3)}  # names of functions
USING |= {"linear", "bilinear", "convolution"}
MULTIPLYING = {"mul", "multiply"}
PRODUCTS = {"matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "tensordot"}
SHAPES = {"size", "stride", "numel", *(f"{kind}_like" for kind in ("zeros", "ones", "full", "empty", "rand", "randn"))}
SHAPES |= {f"new_{kind}" for kind in ("zeros", "ones", "full", "empty", "tensor")}  # results do not depend on values
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
NORMALIZED, USED, FUSED, PASSED, UNKNOWN = "normalized", "used", "normalized inside", "passed", "unknown"


def call_name(module: nn.Module) -> tuple[str, bool]:
    """What a call of a module counts as, and whether it is a single call, whose inside is not followed."""
    if isinstance(module, _ConvNd):
        return FUSED if any(_is_normalization(child) for _, child in tree.named_children(module)) else USED, True
    if _is_normalization(module):
        return NORMALIZED, True
    if isinstance(module, USERS):
        # A subclass of a linear layer may convolve with its weight.
        return USED, not isinstance(module, nn.Linear) or is_from_library(type(module))
    if isinstance(module, torch.jit.ScriptModule):
        return UNKNOWN, True
    library = type(module).__module__.startswith(("torch.nn.modules.", "torch.ao.nn."))
    inner = any(isinstance(part, USERS) for part in tree.modules(module))
    return UNKNOWN if inner else PASSED, library and not isinstance(module, CONTAINERS)


def _is_normalization(module: nn.Module) -> bool:
    """Whether a module is a normalization of PyTorch or, by its name and without weights of layers, another one."""
    # Exceptions whatever their names: one divides by neighbours alone, the other does nothing.
    if isinstance(module, (nn.LocalResponseNorm, nn.Identity)):
        return False
    if isinstance(module, NORMALIZATIONS):
        return True
    inside = list(tree.modules(module))
    using = any(isinstance(part, USERS) for part in inside) or not USING.isdisjoint(names_of(inside))
    return NAMED.search(type(module).__name__) is not None and not using
