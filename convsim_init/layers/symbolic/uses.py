"""How the forward passes and hooks of a model use weights of convolutions, besides calling these.

Symbolic forward passes show that a weight is changed, or that another one is made of it. Which weight that is only a
trial pass can show.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, cast

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from convsim_init.layers import tree
from convsim_init.layers.forward.calls import per_axis
from convsim_init.layers.symbolic.follow import Followed, kernels, origins
from convsim_init.layers.symbolic.kinds import MULTIPLYING, PRODUCTS, USING
from convsim_init.layers.symbolic.symbols import Node, Symbol

CALLED, REPLACED, CHANGED, UNKNOWN = "called", "replaced", "changed", "unknown"
SAME = {"weight", "data", "detach", "to", "type", "type_as", "float", "half", "bfloat16", "double"}
SAME |= {"contiguous", "clone", "requires_grad"}


class Use(NamedTuple):
    """A use of a convolution by a module."""

    by: str  # name of the module in whose forward pass the convolution is called, or its weight used or changed
    how: str  # called as it is, with its weight replaced by one made of it, with its weight changed, or unknown
    hook: str = ""  # "before" or "after" for a hook of that forward pass; empty for the forward pass itself


@dataclass
class Uses:
    """The uses of the convolutions of a model. Layers and modules stand for their names, parameters for their ids."""

    failed: set[str]  # modules whose forward passes could not be followed
    by_layer: defaultdict[str, set[Use]] = field(default_factory=lambda: defaultdict(set))
    changed: set[int] = field(default_factory=set)  # parameters of any module that are changed in place
    ran: set[str] = field(default_factory=set)  # modules whose forward passes could be followed
    tried: set[tuple[str, str]] = field(default_factory=set)  # failed modules, with layers whose use a trial showed
    # By module, the parameters that it makes weights of and convolves with, if these are no layer's.
    other_kernels: defaultdict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    outside: set[str] = field(default_factory=set)  # modules that call convolutions which are not part of the model

    def by(self, module: str, layer: str) -> set[Use]:
        """The uses of a convolution by a module."""
        unknown = {Use(module, UNKNOWN)} if module in self.failed and (module, layer) not in self.tried else set()
        return {use for use in self.by_layer[layer] if use.by == module} | unknown


def find_uses(followed: Followed) -> Uses:
    """The uses of the convolutions of a model."""
    uses, modules = Uses(set(followed.failed)), followed.modules
    layers = {name for name, module in modules.items() if isinstance(module, _ConvNd)}
    constants = defaultdict[str, set[tuple[int, ...]]](set)  # by module, the channels of constant weights of its calls
    for node in (node for nodes, _ in followed.runs for node in nodes if node.caller is not None):
        by = followed.names[id(node.caller)]
        uses.ran.add(by)
        # The pass knows the parameters of the copy, and `changed` is to hold those of the model.
        uses.changed |= {followed.originals.get(key, key) for key in node.changed}
        for name in layers & {followed.names.get(key) for key in node.changed}:
            uses.by_layer[name].add(Use(by, CHANGED, node.hook))
        used = followed.layers(node)
        for name in layers & used:
            otherwise = REPLACED if node.module is None else CHANGED
            how = CALLED if _is_plain(node, cast(_ConvNd, modules[name])) else otherwise
            uses.by_layer[name].add(Use(by, how, node.hook))
            # A module further out may have computed the weight, as by torch.func.functional_call.
            for made in origins(node.weight) if how != CALLED and node.weight is not None else ():
                maker = followed.names.get(id(made.caller), by)
                if not f"{maker}.".startswith(f"{by}." if by else ""):
                    uses.by_layer[name].add(Use(maker, CHANGED, made.hook))
        if node.convolution is not None and node.weight is not None and not layers & used:
            made_of = kernels(node)
            makers = [origin.module for origin in origins(node.weight) if origin.module is not None]
            learned = made_of | {id(parameter) for maker in makers for parameter in tree.parameters(maker)}
            uses.other_kernels[by] |= {followed.originals.get(key, key) for key in learned}
            if not made_of <= followed.names.keys():
                uses.outside.add(by)
            weight = node.convolution.weight
            if not isinstance(weight, Symbol) and not is_lazy(weight):
                constants[by].add(tuple(weight.shape[:2]))
    unused = {name for name in layers if all(use.by == name for use in uses.by_layer[name])}
    # A loop over unknown values has one turn: if it uses the weight of one layer, it may use those of others too.
    making = {use.by for layer_uses in uses.by_layer.values() for use in layer_uses if use.how != CALLED}
    uses.failed |= making & {owner_of(name, modules) for name in unused if name}
    for name, by in _products(followed, unused):
        uses.by_layer[name].add(Use(by, REPLACED))
    for name in unused:
        # A constant with the channels of a layer may be a weight that was made of it before, and kept.
        by = owner_of(name, modules)
        own = (parameter for parameter in tree.parameters(modules[name]) if not is_lazy(parameter))
        if any(tuple(parameter.shape[:2]) in constants[by] for parameter in own):
            uses.by_layer[name].add(Use(by, UNKNOWN))
    return uses


def _products(followed: Followed, unused: set[str]) -> Iterator[tuple[str, str]]:
    """Layers that no module calls, each with a module that multiplies by its weight or writes it to another one."""
    for node in (node for nodes, _ in followed.runs if unused for node in nodes if node.caller is not None):
        # The product may be a convolution by any function, or a part of one, as after a Fourier transform.
        name = node.name if node.module is None else ""
        multiplies = name in PRODUCTS | USING or "conv" in name or (name in MULTIPLYING and len(node.inputs) > 1)
        if node.changed or multiplies:
            learned = node.learned.union(*(origin.learned for before in node.inputs for origin in origins(before)))
            for layer in unused & {followed.names.get(key) for key in learned - node.changed}:
                yield layer, followed.names[id(node.caller)]


def owner_of(name: str, modules: Mapping[str, nn.Module]) -> str:
    """Name of the nearest module around a convolution that has a forward pass, which a ModuleList has not."""
    above = name.rpartition(".")[0]
    # The root may be such a list too, and nothing is above it: without `above and` the loop would not end. A module
    # that was set by setattr may have dots in its name.
    while above and (above not in modules or isinstance(modules[above], (nn.ModuleList, nn.ModuleDict))):
        above = above.rpartition(".")[0]
    return above


def _is_plain(node: Node, module: _ConvNd) -> bool:
    """Whether a call uses a convolution with its own weight, strides and groups."""
    weight = node.weight
    while weight is not None and weight.name in SAME and len(weight.inputs) == 1:
        weight = weight.inputs[0]
    own_weight = weight is None or (weight.name in SAME and len(weight.learned) == 1)
    if (given := node.convolution) is None:
        return own_weight
    own_strides = per_axis(module, "stride")
    strides = given.strides if len(given.strides) > 1 else [*given.strides] * len(own_strides)
    arguments = (given.transposed, given.groups, *strides)
    known = all(type(argument) in (bool, int) for argument in arguments)  # and none is an unknown value
    return own_weight and known and arguments == (module.transposed, module.groups, *own_strides)
