"""The convolutions of a module: which of them are treated, why the others are not, and how their weights are set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from convsim_init.errors import InputError
from convsim_init.settings import Channels

TREATED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class RefusedError(RuntimeError):
    """A parametrization refuses to be assigned to."""


class Layer:
    """One convolution of a model.

    Attributes:
        name: Its dotted name in the unwrapped model.
        module: The convolution.
        obstacle: Why it cannot or must not be treated; None if it can.
    """

    def __init__(self, name: str, module: _ConvNd, obstacle: str | None) -> None:
        self.name = name
        self.module = module
        self.obstacle = obstacle

    @property
    def shape(self) -> list[int]:
        """Shape of the weight; empty while a lazy module has none."""
        weight = self.module.weight
        return [] if isinstance(weight, UninitializedParameter) else list(weight.shape)

    @property
    def device(self) -> torch.device:
        """Where its weight is, or what it is computed from."""
        return next((tensor.device for tensor in self.module.parameters()), torch.device("cpu"))

    @torch.no_grad()
    def write(self, weight: Tensor) -> str | None:
        """Set the weight, through its parametrization if it has one.

        Returns:
            What differs, if the layer then does not use the weight it was given.

        Raises:
            RefusedError: If the parametrization refuses the weight.
        """
        if not parametrize.is_parametrized(self.module, "weight"):
            self.module.weight.copy_(weight)
            return None
        before = self.module.weight.clone()
        try:
            self.module.weight = weight.to(before.device, before.dtype)
        except Exception as error:  # whatever the parametrization's own code raises
            raise RefusedError(f"left as it was: its parametrization cannot be assigned to: {error}") from error
        difference = torch.linalg.vector_norm((self.module.weight - weight.to(before)).double())
        relative = float(difference / torch.linalg.vector_norm(weight.double()))
        if relative <= 1e-5 or relative <= 4 * torch.finfo(before.dtype).eps:
            return None
        return f"its parametrization keeps a weight that differs by {relative:.1%} from the one it was given"


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile wrappers."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def find_layers(
    model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = (), *, frozen: bool = False
) -> list[Layer]:
    """Every convolution of a model, once each, in the order of its modules.

    Args:
        model: Any module, wrapped or not.
        include: Shell patterns of layer names; where any are given, layers that match none are left alone.
        exclude: Shell patterns of layer names to leave alone.
        frozen: Whether frozen layers will do, because nothing is to be changed.

    Raises:
        InputError: If the model has no convolution, or a pattern matches none of them.
    """
    found = [(_bare(name), module) for name, module in unwrap(model).named_modules() if isinstance(module, _ConvNd)]
    if not found:
        raise InputError(f"expected a model with convolutions, got {type(unwrap(model)).__name__}, which has none")
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name, _ in found):
                raise InputError(f"{option}: no convolution matches {pattern!r}; there are {_some(found)}")
    return list(_judge(found, include, exclude, frozen))


def _judge(
    found: Sequence[tuple[str, _ConvNd]], include: Sequence[str], exclude: Sequence[str], frozen: bool
) -> Iterator[Layer]:
    owners: dict[int, str] = {}
    for name, module in found:
        if include and not any(fnmatchcase(name, pattern) for pattern in include):
            obstacle: str | None = "not included"
        elif any(fnmatchcase(name, pattern) for pattern in exclude):
            obstacle = "excluded"
        else:
            obstacle = _obstacle(module, frozen)
        if obstacle is None and not parametrize.is_parametrized(module, "weight"):
            owner = owners.setdefault(id(module.weight), name)
            obstacle = None if owner == name else f"shares its weight with {owner}"
        yield Layer(name, module, obstacle)


def _obstacle(module: _ConvNd, frozen: bool) -> str | None:
    if parametrize.is_parametrized(module, "weight"):
        sources = list(module.parametrizations["weight"].parameters(recurse=False))  # type: ignore[index, union-attr]
    elif "weight" in module._parameters:
        sources = [module.weight]
    else:
        return "its weight is no parameter: a hook such as the old weight_norm computes it"
    if any(isinstance(source, UninitializedParameter) for source in sources):
        return "lazy, without a weight yet: run a forward pass first"
    if any(source.is_meta for source in sources):
        return "on the meta device, without data: move it with to_empty and initialize it first"
    if not frozen and not any(source.requires_grad for source in sources):
        return "frozen: requires_grad is False"
    if any(source.dtype not in TREATED_DTYPES for source in sources):
        return f"its dtype {sources[0].dtype} is not treated"
    return None


def pair_obstacle(bank: Tensor, channels: Channels) -> str | None:
    """Why the filters of a bank ``[G, M, C, *kernel_size]`` form no pair whose similarity could be lowered."""
    groups, filters = bank.shape[:2]
    if filters == 1:
        many = "; channels='all' would compare them" if channels == "matched" and groups > 1 else ""
        return "one filter per group shares its channels with no other" + many if groups > 1 else "only one filter"
    alive = bank.flatten(2).ne(0).any(-1).sum(-1)  # [G]
    if not alive.any():
        return "all weights are zero"
    if alive.max() < 2:
        return "fewer than two filters of a group are not zero"
    return None


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _some(found: Sequence[tuple[str, _ConvNd]]) -> str:
    names = [name or "(the model itself)" for name, _ in found[:4]]
    return ", ".join(names) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
