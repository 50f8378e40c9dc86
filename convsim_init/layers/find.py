"""The convolutions of a model or of a state dict: which are treated, and why the others are not."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from convsim_init.errors import InputError
from convsim_init.layers import tree
from convsim_init.layers.forward.calls import per_axis
from convsim_init.layers.forward.isolation import holding_weights_lock
from convsim_init.layers.forward.owners import find_call, try_unknown, used_weight
from convsim_init.layers.forward.weight import ForwardWeight
from convsim_init.layers.graphs import graph_layers
from convsim_init.layers.inferred import infer_layers
from convsim_init.layers.layer import Layer, Layers
from convsim_init.layers.memory import memories, overlap, refuse_fake_mode
from convsim_init.layers.names import bare_entries, bare_name, unwrap
from convsim_init.layers.obstacle import Cause, Obstacle
from convsim_init.layers.symbolic.follow import follow
from convsim_init.layers.symbolic.uses import owner_of
from convsim_init.layers.weights import ComputedWeight, Weight
from convsim_init.report.patterns import check_patterns, matches
from convsim_init.report.text import error_text, quoted_layer, shown, some

MAX_BASIS = 2**24  # numbers of a Fourier basis: that of a kernel of 45x45 taps, or of 2896


def find_convolutions(model: nn.Module) -> list[tuple[str, _ConvNd]]:
    """All convolution modules of a model in order, each once, with their names in the unwrapped model.

    Raises:
        InputError: If there is none, two have the same name, or the model is no module.
    """
    refuse_fake_mode()
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a module, got {type(model).__name__}: pass the model itself")
    if not (found := _convolutions(unwrap(model))):
        _module_layers(unwrap(model))  # raises an error if there is no layer of another kind either
        raise InputError(
            "expected convolutions that are modules of torch.nn, got calls in classes of your own or in a graph: of "
            "TorchScript or an exported program pass the model that it was made from"
        )
    return found


def _convolutions(model: nn.Module) -> list[tuple[str, _ConvNd]]:
    modules = tree.named_modules(model)
    found = [(bare_name(name), module) for name, module in modules if isinstance(module, _ConvNd)]
    for name, count in Counter(name for name, _ in found).items():
        if count > 1:
            raise InputError(
                f"expected convolutions with different names, got {count} called {quoted_layer(name)}, without what "
                "wrappers add to names: rename one"
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
    """All convolutions, each once, in the order of the model's modules or of the state dict's keys.

    Args:
        source: Any module, wrapped or not, or a state dict.
        include: Shell patterns of layer names; if any are given, layers that match none are left alone.
        exclude: Shell patterns of layer names to leave alone.
        read_only: Whether nothing is to be changed, so that layers which cannot or must not be set are accepted.
        obstacle: Function that returns another reason to leave a layer alone, or None.

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
            libraries = {type(value).__module__.partition(".")[0] for value in source.values()}
            inside = ": pass the state dict in it" if any(isinstance(e, Mapping) for e in source.values()) else ""
            hint = ": make tensors of its arrays, as by torch.from_numpy" if libraries & {"numpy", "jaxlib"} else inside
            raise InputError(f"expected a state dict with convolution weights, of rank 3 to 5, got {many}{hint}")
    else:
        raise InputError(f"expected a module or its state dict, got {type(source).__name__}: build or load it first")
    names = [layer.name for layer in layers]
    # Patterns are checked first, because looking for obstacles runs trial passes.
    check_patterns("include", include, names)
    check_patterns("exclude", exclude, names)
    for layer in layers:
        # The obstacle of the weight comes last: it may run the module, which unselected layers should not do.
        layer.obstacle = (
            unselected(layer.name, include, exclude) or obstacle(layer) or layer.weight.obstacle(read_only=read_only)
        )
        # A call that the trial passes saw takes precedence over the attributes of the module.
        if (call := layer.weight.call) is not None:
            layer.groups, layer.transposed, layer.strides = call.groups, call.transposed, call.strides
        if layer.obstacle is None and (layer.groups < 1 or layer.shape[0] % layer.groups):
            text = f"its {layer.groups} groups do not divide dimension 0 of its weight, {layer.shape[0]}"
            layer.obstacle = Obstacle(text)
    _leave_shared(layers, read_only=read_only)
    return layers


def _leave_shared(layers: Layers, *, read_only: bool) -> None:
    """Set as a layer's obstacle that it shares memory with an earlier one or with one that is left alone."""
    # The memory of weights with the name of its owner. Layers that are left alone come first: they must not change.
    taken = [
        (memory, f"{shown(layer.name)}, left alone: {layer.obstacle.text.partition(':')[0]}")
        for layer in layers
        if layer.obstacle is not None and not read_only
        for memory in memories(layer.weight.sources)
    ]
    stored: dict[int, Layer] = {}  # the layers so far, by the ids of their sources
    within: dict[int, Layer] = {}  # the same by the ids of the parameters that their used weights are made of
    for layer in layers:
        if layer.obstacle is not None:
            continue
        sources, parts = layer.weight.source_ids, layer.weight.made_of
        first = next(filter(None, [*map(within.get, sources), *map(stored.get, parts)]), None)
        # Treating one would change the other. If they are only read, both count, unless they are the same weight.
        if (
            first is not None
            and not sources & first.weight.source_ids
            and (not read_only or parts == first.weight.made_of)
            and pair_obstacle(first.bank("matched")) is None
        ):
            layer.obstacle = Obstacle(f"used together with {shown(first.name)}, as one weight")
            continue
        own = memories(layer.weight.sources)
        owner = next((name for other, name in taken if any(overlap(memory, other) for memory in own)), None)
        # Also if this layer is left alone now: a third one may overlap with this one only.
        taken += [(memory, shown(layer.name)) for memory in own]
        if owner is not None:
            layer.obstacle = Obstacle(f"shares its weight with {owner}")
            continue
        stored |= dict.fromkeys(sources, layer)
        for part in parts:
            within.setdefault(part, layer)


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a convolution of torch.ao, whose weight consists of packed integers and is no parameter."""
    return tree.has_attribute(module, "kernel_size") and tree.has_attribute(module, "_packed_params")


def count_obstacle(filters: int, groups: int) -> str | None:
    """Why so many filters per group form no pair, whatever their values are; None if they form pairs."""
    if filters > 1:
        return None
    return "one filter per group shares its channels with no other" if groups > 1 else "only one filter"


def pair_obstacle(bank: Tensor) -> str | None:
    """Why the filters of a bank ``[G, M, C, *kernel_size]`` form no pair whose similarity could be lowered, or None."""
    groups, filters, _, *kernel_size = bank.shape
    taps = math.prod(kernel_size)
    if taps * math.prod(2 * size - 1 for size in kernel_size) > MAX_BASIS:
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
    _convolutions(model)  # raises an error if two have the same name
    layers = Layers(followed=follow(model))
    in_graphs: tuple[str, ...] = ()  # prefixes of the modules in a graph, whose convolutions it calls itself
    modules, uses = dict(tree.named_modules(model)), layers.uses
    try_unknown(uses, modules)  # adds to `uses`, which the loop reads
    for name, module in modules.items():
        # No name starts with an empty tuple, and all start with the empty prefix of a graph at the root.
        if name.startswith(in_graphs):
            continue
        if isinstance(module, _ConvNd):
            owner = owner_of(name, modules)
            weight = used_weight(module, modules[owner] if name else None, uses.by(owner, name))
            layers.append(_layer(bare_name(name), module, weight))
        elif found := find_call(module):
            layers.append(Layer(bare_name(name), type(module).__name__, found))
        elif in_graph := graph_layers(bare_name(name), module):
            layers += in_graph
            in_graphs += (f"{name}." if name else "",)
    if not layers:
        quantized = [name for name, module in modules.items() if is_quantized(module)]
        callers = [*uses.other_kernels, *uses.outside, *quantized]
        why = "has none"
        if kinds := dict.fromkeys(shown(type(part).__name__) for name, part in modules.items() if name in uses.failed):
            why += f" that is known: the code of {some(kinds)} could not be followed"
        if callers:
            why = f"has none that is known: the code of {shown(type(modules[callers[0]]).__name__)} seems to call some"
        raise InputError(f"expected a model with convolutions, got {shown(type(model).__name__)}, which {why}")
    return layers


def _layer(name: str, module: _ConvNd, weight: Weight) -> Layer:
    layer = Layer(name, type(module).__name__, weight)
    try:
        layer.groups, layer.transposed = operator.index(module.groups), bool(module.transposed)
        layer.strides = math.prod(per_axis(module, "stride"))
    except Exception as error:  # of any kind: attributes may be set to anything, or computed
        if not isinstance(weight, ForwardWeight):  # whose call shows them
            reason = f"its groups or strides cannot be read: {error_text(error)}"
            layer.weight = ComputedWeight(weight.sources[0], None, reason)
    return layer


def unselected(name: str, include: Sequence[str], exclude: Sequence[str]) -> Obstacle | None:
    """Why these patterns do not select a layer of that name; None if they do."""
    if include and not matches(name, include):
        return Obstacle("not included", Cause.UNSELECTED)
    return Obstacle("excluded", Cause.UNSELECTED) if matches(name, exclude) else None
