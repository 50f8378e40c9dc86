"""The convolutions of a model or of a state dict: which are treated, and why the others are not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from convsim_init.errors import InputError
from convsim_init.layers import tree
from convsim_init.layers.forward.isolation import holding_weights_lock
from convsim_init.layers.graphs import graph_layers
from convsim_init.layers.inferred import infer_layers
from convsim_init.layers.layer import Layer, Layers
from convsim_init.layers.memory import memories, overlap, refuse_fake_mode
from convsim_init.layers.names import bare_entries, bare_name, unwrap
from convsim_init.layers.obstacle import Cause, Obstacle
from convsim_init.layers.owners import find_call, try_unknown, used_weight
from convsim_init.layers.symbolic.follow import follow
from convsim_init.layers.symbolic.uses import owner_of
from convsim_init.report.patterns import check_patterns, matches
from convsim_init.report.text import shown

LARGEST_BASIS = 2**24  # numbers: a kernel of 45x45 taps, or of 2896


def find_convolutions(model: nn.Module) -> list[tuple[str, _ConvNd]]:
    """Every convolution module of a model, once each, in order, with its name in the unwrapped model.

    Raises:
        InputError: If there is none, or it is no module.
    """
    refuse_fake_mode()
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a module, got {type(model).__name__}: pass the model itself")
    modules = tree.named_modules(unwrap(model))
    found = [(bare_name(name), module) for name, module in modules if isinstance(module, _ConvNd)]
    if not found:
        _module_layers(unwrap(model))  # raises if there is none of another kind either
        raise InputError(
            "expected convolutions that are modules of torch.nn, got calls in classes of your own or in a graph: of "
            "TorchScript or an exported program pass the model that it was made from"
        )
    return found


def refuse_lazy(model: nn.Module) -> None:
    """Raise an `InputError` if a parameter or buffer of a model is lazy, because a forward pass would change it."""
    for name, tensor in (*tree.named_parameters(model), *tree.named_buffers(model)):
        if is_lazy(tensor):
            raise InputError(
                f"expected a model that has been run, got one whose {name} is lazy: run a forward pass first"
            )


@holding_weights_lock()
def find_layers(
    source: nn.Module | Mapping[str, object],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    *,
    read_only: bool = False,
    obstacle: Callable[[Layer], Obstacle | None] = lambda _: None,
) -> Layers:
    """Every convolution, once each, in the order of the model's modules or of the state dict's keys.

    Args:
        source: Any module, wrapped or not, or a state dict.
        include: Shell patterns of layer names; where any are given, layers that match none are left alone.
        exclude: Shell patterns of layer names to leave alone.
        read_only: Whether layers that cannot or must not be set will do, because nothing is to be changed.
        obstacle: Why a layer is to be left alone for another reason; None if it is not.

    Raises:
        InputError: If there is no convolution, a pattern matches none of them, or the source is something else.
    """
    refuse_fake_mode()
    if isinstance(source, nn.Module):
        layers = _module_layers(unwrap(source))
    elif isinstance(source, Mapping):
        layers = Layers(infer_layers(bare_entries(source)))
        if not layers:
            many = f"{len(source)} entries without any" if source else "an empty one"
            arrays = any(type(one).__module__.partition(".")[0] in ("numpy", "jaxlib") for one in source.values())
            hint = ": make tensors of its arrays, as by torch.from_numpy" if arrays else ""
            raise InputError(f"expected a state dict with convolution weights, of rank 3 to 5, got {many}{hint}")
    else:
        raise InputError(f"expected a module or its state dict, got {type(source).__name__}: build or load it first")
    names = [layer.name for layer in layers]
    # Before obstacles are looked at: those run trial passes, which a misspelt pattern is not worth.
    check_patterns("include", include, names)
    check_patterns("exclude", exclude, names)
    for layer in layers:
        # A weight is asked last, as it may run its module: what is not selected is never run.
        layer.obstacle = (
            unselected(layer.name, include, exclude) or obstacle(layer) or layer.weight.obstacle(read_only=read_only)
        )
        # Only now, as `obstacle` makes the trial passes that see the call.
        if (call := layer.weight.call) is not None:  # which counts, whatever the attributes of the module are
            layer.groups, layer.transposed, layer.strides = call.groups, call.transposed, call.strides
        if layer.obstacle is None and layer.shape[0] % layer.groups:
            text = f"its {layer.groups} groups do not divide dimension 0 of its weight, {layer.shape[0]}"
            layer.obstacle = Obstacle(text)
    _leave_shared(layers, read_only=read_only)
    return layers


def _leave_shared(layers: Layers, *, read_only: bool) -> None:
    """Note as an obstacle that a layer shares the memory of its weight with one before, or with one left alone."""
    taken = [  # what is left alone comes first: a layer that shares its memory would change it
        (one, f"{shown(layer.name)}, left alone: {layer.obstacle.text.partition(':')[0]}")
        for layer in layers
        if layer.obstacle is not None and not read_only
        for one in memories(layer.weight.sources)
    ]
    stored: dict[int, Layer] = {}  # the layers so far, by their sources
    within: dict[int, Layer] = {}  # and by what the weights are made of that they use
    for layer in layers:
        if layer.obstacle is not None:
            continue
        sources, parts = layer.weight.source_ids, layer.weight.made_of
        first = next(filter(None, [*map(within.get, sources), *map(stored.get, parts)]), None)
        # The one would change with the other, if that is treated; read are both, unless they are one and the same.
        if (
            first is not None
            and not sources & first.weight.source_ids
            and (not read_only or parts == first.weight.made_of)
            and pair_obstacle(first.bank("matched")) is None
        ):
            layer.obstacle = Obstacle(f"used together with {shown(first.name)}, as one weight")
            continue
        own = memories(layer.weight.sources)
        owner = next((name for other, name in taken if any(overlap(one, other) for one in own)), None)
        # Also of a layer that is left alone for it: a third one may overlap with this one only.
        taken += [(one, shown(layer.name)) for one in own]
        if owner is not None:
            layer.obstacle = Obstacle(f"shares its weight with {owner}")
            continue
        stored |= dict.fromkeys(sources, layer)
        for part in parts:
            within.setdefault(part, layer)


def is_quantized(module: nn.Module) -> bool:
    """Whether it is a convolution of torch.ao whose weight is packed: of integers, and no parameter."""
    return tree.has_attribute(module, "kernel_size") and tree.has_attribute(module, "_packed_params")


def count_obstacle(filters: int, groups: int) -> str | None:
    """Why filters form no pair whatever their values are, given how many of them there are in a group."""
    if filters > 1:
        return None
    return "one filter per group shares its channels with no other" if groups > 1 else "only one filter"


def pair_obstacle(bank: Tensor) -> str | None:
    """Why the filters of a bank ``[G, M, C, *kernel_size]`` form no pair whose similarity could be lowered."""
    groups, filters, _, *kernel_size = bank.shape
    taps = math.prod(kernel_size)
    if taps * math.prod(2 * size - 1 for size in kernel_size) > LARGEST_BASIS:
        return f"its kernels of {taps} taps are too large: their Fourier basis would not fit in memory"
    if (obstacle := count_obstacle(filters, groups)) is not None:
        return obstacle
    alive = bank.flatten(2).ne(0).any(-1).sum(-1)  # [G]
    if not alive.any():
        return "all weights are zero"
    if alive.max() < 2:
        return "fewer than two filters of a group are not zero"
    return None


def _module_layers(model: nn.Module) -> Layers:
    layers = Layers(followed=follow(model))
    within: tuple[str, ...] = ()  # the modules inside one whose graph calls all of their convolutions
    owners, uses = dict(tree.named_modules(model)), layers.uses
    # Before the layers are looked at, each of which reads from `uses` what trials added.
    try_unknown(uses, owners)
    for name, module in owners.items():
        # An empty tuple is the start of no name, and the empty name of a graph's root that of all.
        if name.startswith(within):
            continue
        if isinstance(module, _ConvNd):
            owner = owner_of(name, owners)
            weight = used_weight(module, owners[owner] if name else None, uses.by(owner, name))
            layer = Layer(bare_name(name), type(module).__name__, weight, module.groups, module.transposed)
            layer.strides = math.prod(module.stride)
            layers.append(layer)
        elif found := find_call(module):
            layers.append(Layer(bare_name(name), type(module).__name__, found))
        elif in_graph := graph_layers(bare_name(name), module):
            layers += in_graph
            within += (f"{name}." if name else "",)
    if not layers:
        quantized = (name for name, one in owners.items() if is_quantized(one))
        calling = next((type(owners[name]).__name__ for name in (*uses.others, *uses.outside, *quantized)), None)
        why = f"has none that is known: the code of {shown(calling)} seems to call some" if calling else "has none"
        raise InputError(f"expected a model with convolutions, got {shown(type(model).__name__)}, which {why}")
    return layers


def unselected(name: str, include: Sequence[str], exclude: Sequence[str]) -> Obstacle | None:
    """Why a layer of that name is not chosen by these patterns; None if it is."""
    if include and not matches(name, include):
        return Obstacle("not included", Cause.UNSELECTED)
    return Obstacle("excluded", Cause.UNSELECTED) if matches(name, exclude) else None
