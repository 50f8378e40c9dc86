"""The convolutions of a model or of a state dict: which are treated, and why the others are not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from convsim_init.errors import InputError
from convsim_init.functional.bank import computing_bank
from convsim_init.layers.inferred import find_entries
from convsim_init.layers.standardized import ForwardWeight, has_forward_of_its_own
from convsim_init.layers.weights import EntryWeight, Weight, held_weight
from convsim_init.report.report import check_patterns
from convsim_init.report.text import shown
from convsim_init.settings import Channels

LARGEST_BASIS = 2**24  # numbers: a kernel of 45x45 taps, or of 2896


class Layer:
    """One convolution.

    Attributes:
        name: Its dotted name in the unwrapped model.
        kind: Its class.
        weight: The weight that its forward pass uses.
        groups: Its groups.
        transposed: Whether it is a transposed one.
        note: What groups and transposed were told from, where no module says it.
        obstacle: Why it cannot or must not be treated; None if it can.
    """

    def __init__(
        self, name: str, kind: str, weight: Weight, *, groups: int, transposed: bool, note: str | None = None
    ) -> None:
        self.name = name
        self.kind = kind
        self.weight = weight
        self.groups = groups
        self.transposed = transposed
        self.note = note
        self.obstacle: str | None = None

    @property
    def shape(self) -> list[int]:
        """Shape of the weight; empty while a lazy module has none."""
        return self.weight.shape

    @property
    def device(self) -> torch.device:
        """Where its weight is, or what it is computed from."""
        return self.weight.sources[0].device

    def bank(self, channels: Channels = "matched", device: torch.device | str | None = None) -> Tensor:
        """The weight that is used as a filter bank ``[G, M, C, *kernel_size]`` to compute with; not to be changed."""
        weight = self.weight.read().to(device)
        return computing_bank(weight, groups=self.groups, transposed=self.transposed, channels=channels)

    def explained(self, reason: str | None) -> str | None:
        """What became of it, and what it was taken for where that was told from little."""
        if reason is None or self.note is None:
            return reason or self.note
        return reason if (self.groups, self.transposed) == (1, False) else f"{self.note}: {reason}"


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile wrappers."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def find_convolutions(model: nn.Module) -> list[tuple[str, _ConvNd]]:
    """Every convolution of a model, once each, in the order of its modules, with its name in the unwrapped model.

    Raises:
        InputError: If the model has no convolution.
    """
    inner = unwrap(model)
    found = [(_bare(name), module) for name, module in inner.named_modules() if isinstance(module, _ConvNd)]
    if not found:
        raise InputError(f"expected a model with convolutions, got {type(inner).__name__}, which has none")
    return found


def find_layers(
    source: nn.Module | Mapping[str, object],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    *,
    frozen: bool = False,
) -> list[Layer]:
    """Every convolution, once each, in the order of the model's modules or of the state dict's keys.

    Args:
        source: Any module, wrapped or not, or a state dict.
        include: Shell patterns of layer names; where any are given, layers that match none are left alone.
        exclude: Shell patterns of layer names to leave alone.
        frozen: Whether frozen layers will do, because nothing is to be changed.

    Raises:
        InputError: If there is no convolution, a pattern matches none of them, or the source is something else.
    """
    if isinstance(source, nn.Module):
        layers = [_layer_of(name, module) for name, module in find_convolutions(source)]
        obstacles = dict[str, str | None]()
    elif isinstance(source, Mapping):
        entries = list(find_entries(source))
        if not entries:
            many = f"{len(source)} entries without any" if source else "an empty one"
            raise InputError(f"expected a state dict with convolution weights, of rank 3 to 5, got {many}")
        layers = [
            Layer(e.name, e.kind, EntryWeight(e.weight), groups=e.groups, transposed=e.transposed, note=e.note)
            for e in entries
        ]
        obstacles = {entry.name: entry.obstacle for entry in entries}
    else:
        raise InputError(f"expected a module or its state dict, got {type(source).__name__}")
    names = [layer.name for layer in layers]
    check_patterns("include", include, names)
    check_patterns("exclude", exclude, names)
    owners: dict[int, str] = {}
    for layer in layers:
        layer.obstacle = _unselected(layer.name, include, exclude) or obstacles.get(layer.name)
        layer.obstacle = layer.obstacle or layer.weight.obstacle(frozen=frozen)
        if layer.obstacle is None:
            owner = owners.setdefault(id(layer.weight.sources[0]), layer.name)
            layer.obstacle = None if owner == layer.name else f"shares its weight with {shown(owner)}"
    return layers


def used_weight(module: _ConvNd) -> Weight:
    """The weight that a convolution's forward pass uses."""
    weight = held_weight(module)
    return ForwardWeight(module, weight) if has_forward_of_its_own(module) else weight


def lone_obstacle(filters: int, groups: int, channels: Channels) -> str | None:
    """Why filters form no pair whatever their values are, given how many of them there are in a group."""
    if filters > 1:
        return None
    many = "; channels='all' would compare them" if channels == "matched" and groups > 1 else ""
    return "one filter per group shares its channels with no other" + many if groups > 1 else "only one filter"


def pair_obstacle(bank: Tensor, channels: Channels) -> str | None:
    """Why the filters of a bank ``[G, M, C, *kernel_size]`` form no pair whose similarity could be lowered."""
    obstacle = shape_obstacle(bank.shape, channels)
    if obstacle:
        return obstacle
    alive = bank.flatten(2).ne(0).any(-1).sum(-1)  # [G]
    if not alive.any():
        return "all weights are zero"
    if alive.max() < 2:
        return "fewer than two filters of a group are not zero"
    return None


def shape_obstacle(shape: Sequence[int], channels: Channels) -> str | None:
    """Why filters of a bank of that shape ``[G, M, C, *kernel_size]`` cannot be treated, whatever their values are."""
    groups, filters, _, *kernel_size = shape
    taps = math.prod(kernel_size)
    if taps * math.prod(2 * size - 1 for size in kernel_size) > LARGEST_BASIS:
        return f"its kernels of {taps} taps are too large: their Fourier basis would not fit in memory"
    return lone_obstacle(filters, groups, channels)


def _layer_of(name: str, module: _ConvNd) -> Layer:
    return Layer(name, type(module).__name__, used_weight(module), groups=module.groups, transposed=module.transposed)


def _unselected(name: str, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    if include and not any(fnmatchcase(name, pattern) for pattern in include):
        return "not included"
    return "excluded" if any(fnmatchcase(name, pattern) for pattern in exclude) else None


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
