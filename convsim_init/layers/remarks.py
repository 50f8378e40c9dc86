"""Remarks on a model besides its layers, such as on kernels that were not looked at."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from convsim_init.layers import tree
from convsim_init.layers.find import is_quantized
from convsim_init.layers.forward.isolation import holding_weights_lock
from convsim_init.layers.forward.owners import used_weight
from convsim_init.layers.forward.weight import ForwardWeight
from convsim_init.layers.layer import Layer, Layers
from convsim_init.layers.memory import memories, overlap
from convsim_init.layers.names import bare_name, unwrap
from convsim_init.layers.obstacle import Cause
from convsim_init.layers.symbolic.passes import AFTER
from convsim_init.layers.symbolic.symbols import tensors_in
from convsim_init.layers.symbolic.uses import CALLED, Uses, owner_of
from convsim_init.layers.weights import KERNEL_RANKS, Weight
from convsim_init.report.text import layer_name, shown, some

USUAL = frozenset(vars(nn.Module()))  # attributes of every module
SMALL_SHARE = 0.25  # of a model's parameters; where fewer are treated, a report says so
NEAR = 2  # levels of nested containers and objects that are searched for copies


@holding_weights_lock()
def model_remarks(model: nn.Module | Mapping[str, object], layers: Layers) -> list[str]:
    """Remarks on a model or a state dict that the reports of its layers do not make."""
    if not isinstance(model, nn.Module) or layers.followed is None:
        return [*_arrays(model), *_ties(model.items(), layers)] if isinstance(model, Mapping) else []
    inner, uses, modules = unwrap(model), layers.uses, layers.followed.modules
    return [
        *_other_kernels(inner, layers, uses),
        *_quantized(inner),
        *_from_elsewhere(uses, modules),
        *_used_elsewhere(modules, layers, uses),
        *_ties(named_tensors(inner), layers),
    ]


def share_remarks(
    model: nn.Module | Mapping[str, object], layers: Sequence[Layer], treated: Collection[str]
) -> list[str]:
    """The share of a model's parameters in the layers that are treated, where it is small and nobody chose that."""
    parameters = list(tree.parameters(model)) if isinstance(model, nn.Module) else []
    obstacles = [layer.obstacle for layer in layers if layer.obstacle is not None]
    # Layers with a twin were treated before.
    chosen = any(obstacle.cause is not Cause.UNTREATABLE or obstacle.twin for obstacle in obstacles)
    if chosen or any(map(is_lazy, parameters)):
        return []
    weights = [layer.weight for layer in layers if layer.name in treated]
    ids = set[int]().union(*(weight.made_of | weight.source_ids for weight in weights))
    total = sum(parameter.numel() for parameter in parameters)
    count = sum(parameter.numel() for parameter in parameters if id(parameter) in ids)
    if not 0 < count < SMALL_SHARE * total:
        return []
    share = f"{count / total:.1%}" if count >= total / 1000 else "less than 0.1%"
    return [f"{share} of the model's parameters ({count:,} of {total:,}) are in layers that are treated"]


def _other_kernels(model: nn.Module, layers: Sequence[Layer], uses: Uses) -> Iterator[str]:
    """A remark on modules that seem to convolve but are no layers, with their classes.

    They convolve with weights made of parameters of no layer, or have weights with the rank of a kernel, or weights and
    a ``kernel_size``. If a forward pass could not be followed, the names of its parameters do not matter.
    """
    names = [layer.name for layer in layers]
    found, inside = Counter[str](), tuple(f"{name}." for name in names)
    kernels = set[int]()
    known = {id(p) for part in tree.modules(model) if isinstance(part, _ConvNd) for p in tree.parameters(part)}
    known |= {id(source) for layer in layers for source in layer.weight.sources}
    parameters = {id(parameter): parameter for parameter in tree.parameters(model) if not is_lazy(parameter)}
    others = parameters.keys() - known
    no_biases = {key for key in others if parameters[key].dim() > 1}
    for name, module in tree.named_modules(model):
        bare = bare_name(name)
        if isinstance(module, _ConvNd) or bare in names or f"{bare}.".startswith(inside):
            continue
        own_parameters, unclear = module._parameters.items(), name in uses.failed
        likely = (p for k, p in own_parameters if unclear or "weight" in k or "kernel" in k or _is_complex(p))
        own = {id(parameter) for parameter in likely if _is_kernel(module, parameter)}
        # Biases of the modules that make a weight are no kernels, unless the weight is made of biases alone.
        made_of = uses.other_kernels[name] & others
        own = own & others | (made_of & no_biases or made_of)
        kernels |= own
        if own:
            found[type(module).__name__] += 1
    if found:
        total = sum(parameter.numel() for parameter in parameters.values())
        share = sum(parameters[key].numel() for key in kernels) / total
        yield f"not looked at, though they may convolve: {_counted(found)}, with {share:.0%} of the parameters"


def _is_complex(parameter: Tensor | None) -> bool:
    """Whether a parameter has complex numbers, as the Fourier transforms of kernels do, whatever its name is."""
    return parameter is not None and parameter.dtype.is_complex


def _is_kernel(module: nn.Module, weight: Tensor | None) -> bool:
    """Whether a module may use a parameter as kernels; factors of channels, such as ``[M, 1, 1]``, are none."""
    if weight is None or is_lazy(weight):
        return False
    kernels = weight.dim() in KERNEL_RANKS and weight.numel() > max(weight.shape)
    return kernels or tree.has_attribute(module, "kernel_size")


def _counted(kinds: Counter[str]) -> str:
    return some(f"{count} {shown(kind)}" for kind, count in kinds.most_common())


def _arrays(state: Mapping[str, object]) -> Iterator[str]:
    """A remark on entries that have the rank of a weight but are no tensors."""
    shapes = {key: getattr(value, "shape", ()) for key, value in state.items() if not isinstance(value, Tensor)}
    found = [key for key, shape in shapes.items() if isinstance(shape, tuple) and len(shape) in KERNEL_RANKS]
    if found:
        yield f"not looked at, for they are no tensors of torch, as torch.from_numpy makes: {some(map(shown, found))}"


def _quantized(model: nn.Module) -> Iterator[str]:
    """A remark on quantized convolutions."""
    found = Counter(type(module).__name__ for module in tree.modules(model) if is_quantized(module))
    if found:
        yield f"not looked at, for their weights are quantized: {_counted(found)}"


def _from_elsewhere(uses: Uses, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Remarks on convolutions outside the model, and on hooks and forward passes that may change or replace weights."""
    if uses.outside:
        yield f"not looked at, for they are no parts of the model: convolutions that {_names(uses.outside)} calls"
    passes, hooks = set[str](), set[str]()
    for layer, layer_uses in uses.by_layer.items():
        for use in (use for use in layer_uses if use.how != CALLED):
            if use.hook and (use.hook == AFTER or use.by not in (owner_of(layer, modules), layer)):
                hooks.add(use.by)
            elif not use.hook and not _holds(modules[use.by], modules[layer]):
                passes.add(use.by)
    if hooks:
        yield f"not tried, though they may change weights of others or later: hooks of {_names(hooks)}"
    if passes:
        yield f"not tried, though they may use other weights: the forward passes of {_names(passes)}"


def _names(modules: Iterable[str]) -> str:
    return some(layer_name(bare_name(name)) for name in sorted(modules))


def _holds(owner: nn.Module, part: nn.Module) -> bool:
    """Whether a module has another one as a child or in its lists, or is it."""
    lists = (nn.ModuleList, nn.ModuleDict)
    for _, child in tree.named_children(owner):
        if child is part or (isinstance(child, lists) and _holds(child, part)):
            return True
    return owner is part


def _used_elsewhere(modules: Mapping[str, nn.Module], layers: Sequence[Layer], uses: Uses) -> Iterator[str]:
    """A remark on convolutions that several modules hold, if one besides the owner may use another weight."""
    weights = {layer.name: layer.weight for layer in layers if layer.obstacle is None}
    found = []
    for name, layer_uses in uses.by_layer.items():
        weight, module, owner = weights.get(bare_name(name)), modules[name], owner_of(name, modules)
        if weight is None or all(use.how == CALLED for use in layer_uses):
            continue
        for by in sorted({use.by for use in layer_uses} - {owner, name}):
            if _holds(modules[by], module):
                used = used_weight(cast(_ConvNd, module), modules[by], uses.by(by, name))
                if _may_differ(used, weight, module):
                    found.append(f"{layer_name(bare_name(name))} (in {layer_name(bare_name(by))})")
    if found:
        yield f"held by other modules too, which may use other weights, and those do not count: {some(found)}"


@torch.no_grad()
def _may_differ(used: Weight, weight: Weight, module: nn.Module) -> bool:
    """Whether two modules around a convolution may use different weights of it."""
    if not any(isinstance(either, ForwardWeight) and either.module is not module for either in (used, weight)):
        return used.note not in (None, weight.note)
    try:
        return not torch.equal(used.read(), weight.read())
    except Exception:  # of any kind, from the module's own code
        return True


def _ties(entries: Iterable[tuple[str, object]], layers: Sequence[Layer]) -> Iterator[str]:
    """A remark on tensors that belong to no convolution but share memory with a treated layer."""
    own = {id(tensor) for layer in layers for tensor in (*layer.weight.sources, *layer.weight.storage().values())}
    treated = memories(source for layer in layers if layer.obstacle is None for source in layer.weight.sources)
    # Memory that overlaps starts before the end, and no more than the greatest length before the start.
    treated.sort(key=attrgetter("start"))
    starts, longest = [memory.start for memory in treated], max((m.end - m.start for m in treated), default=0)
    found = []
    for name, tensor in entries:
        for memory in memories([tensor]) if isinstance(tensor, Tensor) and id(tensor) not in own else ():
            near = treated[bisect_left(starts, memory.start - longest) : bisect_left(starts, memory.end)]
            if any(overlap(memory, other) for other in near):
                found.append(shown(bare_name(name)))
    if found:
        yield f"in the memory of weights of layers, and change with them: {some(found)}"


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The names and tensors of a model's parameters, buffers and attributes, each tensor once."""
    named = [*tree.named_parameters(model), *tree.named_buffers(model)]
    for name, part in tree.named_modules(model):
        for key, value in vars(part).items():
            if key not in USUAL:
                named += ((f"{name}.{key}".lstrip("."), tensor) for tensor in tensors_in(value, NEAR))
    found = dict[int, tuple[str, Tensor]]()
    for name, tensor in named:  # the first of several names stays
        found.setdefault(id(tensor), (name, tensor))
    yield from found.values()
