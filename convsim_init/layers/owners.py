"""The weight that is used: by a convolution, by the module around it, or by one that is none and calls one itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from convsim_init.layers import tree
from convsim_init.layers.forward.calls import has_forward_of_its_own
from convsim_init.layers.forward.trial import Call, is_parameter, leaves
from convsim_init.layers.forward.weight import ForwardWeight, parts_of
from convsim_init.layers.memory import is_sharded
from convsim_init.layers.stored import has_unknown_hook, stored_weight
from convsim_init.layers.symbolic.passes import AFTER
from convsim_init.layers.symbolic.uses import CALLED, CHANGED, REPLACED, UNKNOWN, Use, Uses, owner_of
from convsim_init.layers.weights import KERNEL_RANKS, StoredWeight, Weight

MAX_ENTRIES = 3  # inputs of other convolutions that are tried


def find_call(module: nn.Module) -> ForwardWeight | None:
    """The weight of a module that is no convolution of PyTorch and gives it to one itself.

    Modules with kernels inside them are left out: those are found by themselves.
    """
    # A trial pass sees nothing of what TorchScript calls: `graph_layers` reads the graphs of both.
    if isinstance(module, (torch.jit.ScriptModule, fx.GraphModule)):
        return None
    try:
        stored = stored_weight(module)
        own = len(stored.shape) in KERNEL_RANKS and isinstance(stored.sources[0], nn.Parameter)
        inside = (one for child in parts_of(module) for one in tree.parameters(child))
        if not own or any(len(one.shape) in KERNEL_RANKS for one in inside):
            return None
        weight = ForwardWeight(module, stored)
        weight.choose_call()
        return weight
    except Exception:  # whatever its own code raises at an input that is not what it is made for
        return None


def used_weight(module: _ConvNd, owner: nn.Module | None = None, uses: Collection[Use] = ()) -> Weight:
    """The weight that a convolution's forward pass uses, or that of the module around it, by how that uses it."""
    weight = stored_weight(module)
    if any(map(is_sharded, weight.sources)):  # a trial pass would leave it gathered
        return weight
    if owner is not None and (within := _weight_within(owner, module, weight, uses)) is not None:
        return within
    # Hooks on all modules run before this one's, and may change its weight as its own may.
    hooked = has_unknown_hook(module) or bool(nn.modules.module._global_forward_pre_hooks)
    # Without an inverse the stored weight is the original: a pass tells what is made of it.
    one_way = isinstance(weight, StoredWeight) and is_parametrized(module, "weight")
    needs_trial = has_forward_of_its_own(module) or hooked or one_way
    return ForwardWeight(module, weight) if needs_trial else weight


def _weight_within(owner: nn.Module, module: _ConvNd, stored: Weight, uses: Collection[Use]) -> ForwardWeight | None:
    """The weight of a convolution as the module around it uses it, where that does more than to call it.

    A trial pass tells, with an input for the convolution or, where its code fails at that one, for others inside. Where
    none can be made, `ForwardWeight.obstacle` says so if another weight is made of this one. What is not known of a
    module after `try_unknown` is not tried again.
    """
    replaces = any(use.how == REPLACED for use in uses)
    # Trial passes run without the hooks after a forward pass; of these `remarks` tells.
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
        except TypeError:  # as where it takes more than one input
            break
        except Exception:  # whatever its own code raises at an input that is not what it is made for
            continue
    # The loop left another one there, and the obstacle is to tell of the convolution's own input.
    weight.entry = module
    if changes and not replaces:
        what = f"a hook of {type(owner).__name__}" if all(changes) else type(owner).__name__
        stored.note = stored.note or f"{what} may change it in its forward pass, which could not be tried"
    return weight if replaces else None


def try_unknown(uses: Uses, modules: Mapping[str, nn.Module]) -> None:
    """Add to what followed passes tell how modules use convolutions in them that could not be followed, by trials."""
    held = defaultdict[str, dict[int, str]](dict)  # the layers by their weights' ids, by the modules that they are in
    for name, module in modules.items():
        if isinstance(module, _ConvNd) and name and (by := owner_of(name, modules)) in uses.failed:
            held[by] |= dict.fromkeys(stored_weight(module).source_ids, name)
    for by, layers in held.items():
        for call in _calls(modules[by]):
            how = CALLED if is_parameter(call.weight) else REPLACED
            for layer in {layers[source] for source in leaves(call.weight) & layers.keys()}:
                uses.of[layer].add(Use(by, how))
                uses.tried.add((by, layer))


def _calls(owner: nn.Module) -> Sequence[Call]:
    """What a trial pass gives to convolutions, whichever; nothing if none can be made."""
    for entry in _entries(owner):
        weight = ForwardWeight(owner, stored_weight(entry))
        weight.entry = entry
        with suppress(Exception):  # whatever its own code raises at an input that is not what it is made for
            return weight.calls(others=())[0]
    return ()


def _entries(owner: nn.Module) -> list[_ConvNd]:
    """Convolutions whose input a module may take: of those inside it the ones of fewest channels, one of a kind."""
    found: dict[tuple[int, int], _ConvNd] = {}
    for part in tree.modules(owner):
        if isinstance(part, _ConvNd):
            found.setdefault((part.in_channels, len(part.kernel_size)), part)
    return [found[kind] for kind in sorted(found)[:MAX_ENTRIES]]
