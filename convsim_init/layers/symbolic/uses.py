"""How the forward passes and hooks of a model use weights of convolutions, besides calling these.

That is told by forward passes on unknown values. They show that a weight is changed or that another one is made of it;
what comes of that a trial pass tells, or nobody.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, cast

from torch import nn
from torch.nn.modules.conv import _ConvNd

from convsim_init.layers import tree
from convsim_init.layers.symbolic.follow import Followed, kernels, origins
from convsim_init.layers.symbolic.kinds import MULTIPLYING, PRODUCTS, USING
from convsim_init.layers.symbolic.symbols import Node

CALLED, REPLACED, CHANGED, UNKNOWN = "called", "replaced", "changed", "unknown"
SAME = {"weight", "data", "detach", "to", "type", "type_as", "float", "half", "bfloat16", "double"}
SAME |= {"contiguous", "clone", "requires_grad"}


class Use(NamedTuple):
    """A use of a convolution: as it stands, replaced by a weight that is made of its own, changed, or unknown."""

    by: str  # name of the module in whose forward pass it is called, or its weight used or changed
    how: str
    hook: str = ""  # whether it is in a hook "before" or "after" that forward pass; empty if it is in itself


@dataclass
class Uses:
    """The uses of the convolutions of a model; layers and modules by their names, parameters by their ids."""

    failed: set[str]  # modules whose forward passes could not be followed
    of: defaultdict[str, set[Use]] = field(default_factory=lambda: defaultdict(set))  # each layer
    changed: set[int] = field(default_factory=set)  # parameters that are changed in place, of whatever module
    ran: set[str] = field(default_factory=set)  # modules whose forward passes could be followed
    tried: set[tuple[str, str]] = field(default_factory=set)  # failed ones with layers whose use a trial pass has told
    # Parameters that other weights are made of, by the modules that convolve with them:
    others: defaultdict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    outside: set[str] = field(default_factory=set)  # modules that call convolutions which are no parts of the model

    def by(self, module: str, layer: str) -> set[Use]:
        """The uses of a convolution by a module."""
        unknown = {Use(module, UNKNOWN)} if module in self.failed and (module, layer) not in self.tried else set()
        return {use for use in self.of[layer] if use.by == module} | unknown


def find_uses(followed: Followed) -> Uses:
    """The uses of the convolutions of a model."""
    uses, modules = Uses(set(followed.failed)), followed.modules
    layers = {name for name, module in modules.items() if isinstance(module, _ConvNd)}
    for node in (node for nodes, _ in followed.runs for node in nodes if node.caller is not None):
        by = followed.names[id(node.caller)]
        uses.ran.add(by)
        # The pass knows the copy's parameters; who reads this asks for those of the model.
        uses.changed |= {followed.originals.get(one, one) for one in node.changed}
        for name in layers & {followed.names.get(one) for one in node.changed}:
            uses.of[name].add(Use(by, CHANGED, node.hook))
        used = followed.layers(node)
        for name in layers & used:
            otherwise = REPLACED if node.module is None else CHANGED
            how = CALLED if _is_plain(node, cast(_ConvNd, modules[name])) else otherwise
            uses.of[name].add(Use(by, how, node.hook))
            # What is computed further out is that module's doing, as by torch.func.functional_call.
            for made in origins(node.weight) if how != CALLED and node.weight is not None else ():
                maker = followed.names.get(id(made.caller), by)
                if not f"{maker}.".startswith(f"{by}." if by else ""):
                    uses.of[name].add(Use(maker, CHANGED, made.hook))
        if node.convolution is not None and node.weight is not None and not layers & used:
            made_of = kernels(node)
            makers = [one.module for one in origins(node.weight) if one.module is not None]
            learned = made_of | {id(one) for maker in makers for one in tree.parameters(maker)}
            uses.others[by] |= {followed.originals.get(one, one) for one in learned}
            if not made_of <= followed.names.keys():
                uses.outside.add(by)
    unused = {name for name in layers if all(use.by == name for use in uses.of[name])}
    # A loop over unknown values is one turn long: what it does with the weight of a layer it does with those of others.
    making = {use.by for its in uses.of.values() for use in its if use.how != CALLED}
    uses.failed |= making & {owner_of(name, modules) for name in unused if name}
    for name, by in _products(followed, unused):
        uses.of[name].add(Use(by, REPLACED))
    return uses


def _products(followed: Followed, unused: set[str]) -> Iterator[tuple[str, str]]:
    """Layers that no module calls, with those that multiply by their weights or write them into others."""
    for node in (node for nodes, _ in followed.runs if unused for node in nodes if node.caller is not None):
        # What multiplies is a convolution by whatever function, or a part of one, as after a Fourier transform.
        name = node.name if node.module is None else ""
        multiplies = name in PRODUCTS | USING or "conv" in name or (name in MULTIPLYING and len(node.inputs) > 1)
        if node.changed or multiplies:
            of = {one for before in node.inputs for origin in origins(before) for one in origin.learned} | node.learned
            for layer in unused & {followed.names.get(one) for one in of - node.changed}:
                yield layer, followed.names[id(node.caller)]


def owner_of(name: str, modules: Mapping[str, nn.Module]) -> str:
    """Name of the module with a forward pass that a convolution of that name is in: none of a list has one."""
    above = name.rpartition(".")[0]
    # The root may be such a list too, and above it is nothing: without `and above` this never ends.
    while isinstance(modules.get(above), (nn.ModuleList, nn.ModuleDict)) and above:
        above = above.rpartition(".")[0]
    return above


def _is_plain(node: Node, module: _ConvNd) -> bool:
    """Whether a call is that of a convolution as it stands."""
    weight = node.weight
    while weight is not None and weight.name in SAME and len(weight.inputs) == 1:
        weight = weight.inputs[0]
    stands = weight is None or (weight.name in SAME and len(weight.learned) == 1)
    if node.convolution is None:
        return stands
    _, _, _, strides, transposed, groups = node.convolution
    asked = (transposed, groups, *(strides if len(strides) > 1 else [*strides] * len(module.stride)))
    own = (module.transposed, module.groups, *module.stride)
    known = all(type(one) in (bool, int) for one in asked)  # and no unknown value
    return stands and known and asked == own
