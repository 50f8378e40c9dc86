"""The weight that is used by a convolution, by the module around it, or by another module that convolves itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from convsim_init.layers import tree
from convsim_init.layers.forward.calls import has_forward_of_its_own, per_axis
from convsim_init.layers.forward.code import may_change
from convsim_init.layers.forward.trial import Call, is_parameter, leaves
from convsim_init.layers.forward.trial_weight import parts_of
from convsim_init.layers.forward.weight import ForwardWeight
from convsim_init.layers.memory import is_sharded
from convsim_init.layers.stored import stored_weight, unknown_hooks
from convsim_init.layers.symbolic.passes import AFTER
from convsim_init.layers.symbolic.uses import CALLED, CHANGED, REPLACED, UNKNOWN, Use, Uses, owner_of
from convsim_init.layers.weights import KERNEL_RANKS, StoredWeight, Weight

MAX_ENTRIES = 3  # convolutions whose inputs are tried for the module around them


def find_call(module: nn.Module) -> ForwardWeight | None:
    """The weight of a module that is no convolution of PyTorch but calls one with a weight of its own, or None.

    Modules whose children have kernels are left out, because those are found by themselves.
    """
    # Trial passes do not see the calls of TorchScript. For graphs there is `graph_layers`.
    if isinstance(module, (torch.jit.ScriptModule, fx.GraphModule)):
        return None
    try:
        stored = stored_weight(module)
        own = len(stored.shape) in KERNEL_RANKS and isinstance(stored.sources[0], nn.Parameter)
        inside = (parameter for child in parts_of(module) for parameter in tree.parameters(child))
        if not own or any(len(parameter.shape) in KERNEL_RANKS for parameter in inside):
            return None
        weight = ForwardWeight(module, stored)
        weight.choose_call()
        return weight
    except Exception:  # of any kind, from the module's own code
        return None


def used_weight(module: _ConvNd, owner: nn.Module | None = None, uses: Collection[Use] = ()) -> Weight:
    """The weight that the forward pass of a convolution uses, or that of the owner around it, with its uses of it."""
    weight = stored_weight(module)
    if any(map(is_sharded, weight.sources)):  # a trial pass would leave it gathered
        return weight
    if owner is not None and (within := _weight_within(owner, module, weight, uses)) is not None:
        return within
    # Global hooks may change the weight, as the module's own hooks may.
    hooks = [*unknown_hooks(module), *nn.modules.module._global_forward_pre_hooks.values()]
    # Without an inverse the stored weight is the original, and a trial pass shows what the parametrization makes of it.
    one_way = isinstance(weight, StoredWeight) and is_parametrized(module, "weight")
    own_code = has_forward_of_its_own(module) or one_way
    if not (own_code or hooks):
        return weight
    used = ForwardWeight(module, weight)
    # Of hooks that name nothing which changes weights, such as loggers, one pass is enough.
    with suppress(Exception):  # of any kind, from the code of hooks: `ForwardWeight.obstacle` reports it
        if not (own_code or any(map(may_change, hooks))) and used.seems_stored():
            weight.call = used.call
            return weight
    return used


def _weight_within(owner: nn.Module, module: _ConvNd, stored: Weight, uses: Collection[Use]) -> ForwardWeight | None:
    """The weight of a convolution that the module around it uses, if that may not be the stored one; else None.

    A trial pass of the owner shows it, with an input for the convolution or, if that fails, for others inside. If no
    pass succeeds, `ForwardWeight.obstacle` reports it where a use replaces the weight; else the stored weight gets a
    note. Uses that are still unknown after `try_unknown` are not tried again.
    """
    replaces = any(use.how == REPLACED for use in uses)
    # Trial passes run without the hooks after a forward pass, which `remarks` mentions.
    changes = [use.hook for use in uses if use.how == CHANGED and use.hook != AFTER]
    if not (replaces or changes):
        if any(use.how == UNKNOWN for use in uses):
            stored.note = stored.note or f"whether {type(owner).__name__} uses another weight of it could not be told"
        return None
    weight = ForwardWeight(owner, stored, module)
    for entry in (module, *_entries(owner)):
        weight.entry = entry
        try:
            if not weight.is_stored():
                return weight
            stored.note, stored.call = stored.note or weight.note, weight.call
            return None
        except TypeError:  # as from a forward pass that takes more than one input
            break
        except Exception:  # of any kind, from the module's own code
            continue
    weight.entry = module  # the obstacle should be about the convolution's own input
    if changes and not replaces:
        what = f"a hook of {type(owner).__name__}" if all(changes) else type(owner).__name__
        stored.note = stored.note or f"{what} may change it in its forward pass, which could not be tried"
    return weight if replaces else None


def try_unknown(uses: Uses, modules: Mapping[str, nn.Module]) -> None:
    """Add to the uses those by modules whose symbolic passes failed, as trial passes show them."""
    held = defaultdict[str, dict[int, str]](dict)  # by owner, the names of its layers by the ids of their sources
    for name, module in modules.items():
        if isinstance(module, _ConvNd) and name and (by := owner_of(name, modules)) in uses.failed:
            held[by] |= dict.fromkeys(stored_weight(module).source_ids, name)
    for by, layers in held.items():
        for call in _calls(modules[by]):
            how = CALLED if is_parameter(call.weight) else REPLACED
            for layer in {layers[source] for source in leaves(call.weight) & layers.keys()}:
                uses.by_layer[layer].add(Use(by, how))
                uses.tried.add((by, layer))


def _calls(owner: nn.Module) -> Sequence[Call]:
    """All calls of convolutions in a trial pass of a module; none if no pass succeeds."""
    for entry in _entries(owner):
        weight = ForwardWeight(owner, stored_weight(entry))
        weight.entry = entry
        with suppress(Exception):  # of any kind, from the module's own code
            return weight.calls(others=())[0]
    return ()


def _entries(owner: nn.Module) -> list[_ConvNd]:
    """Convolutions whose input a module may take: those inside with the fewest channels, one per rank and number."""
    found: dict[tuple[int, int], _ConvNd] = {}
    for part in tree.modules(owner):
        if isinstance(part, _ConvNd):
            found.setdefault((part.in_channels, len(per_axis(part, "kernel_size"))), part)
    return [found[kind] for kind in sorted(found)[:MAX_ENTRIES]]
