"""What a report should say of a model beside its layers: what was not looked at, and copies that part."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from convsim_init.functional.dtypes import converts
from convsim_init.layers import tree
from convsim_init.layers.find import is_quantized
from convsim_init.layers.forward.isolation import holding_weights_lock
from convsim_init.layers.forward.weight import ForwardWeight
from convsim_init.layers.layer import Layer, Layers
from convsim_init.layers.memory import memories, overlap
from convsim_init.layers.names import bare_name, unwrap
from convsim_init.layers.obstacle import KEPT
from convsim_init.layers.owners import used_weight
from convsim_init.layers.symbolic.passes import AFTER
from convsim_init.layers.symbolic.symbols import tensors_in
from convsim_init.layers.symbolic.uses import CALLED, Uses, owner_of
from convsim_init.layers.weights import KERNEL_RANKS, Weight
from convsim_init.report.text import layer_name, shown, some

USUAL = frozenset(vars(nn.Module()))  # attributes of every module
NEAR = 2  # containers and objects within each other that copies are looked for in


@holding_weights_lock()
def model_remarks(model: nn.Module | Mapping[str, object], layers: Layers) -> list[str]:
    """Remarks on a model, or a state dict, that its layers' reports do not make."""
    if not isinstance(model, nn.Module) or layers.followed is None:
        return [*_arrays(model), *_ties(model.items(), layers)] if isinstance(model, Mapping) else []
    inner, uses, modules = unwrap(model), layers.uses, layers.followed.modules
    return [
        *_other_kernels(inner, layers, uses),
        *_quantized(inner),
        *_from_elsewhere(uses, modules),
        *_used_elsewhere(modules, layers, uses),
        *_ties(_tensors_of(inner), layers),
    ]


def _other_kernels(model: nn.Module, layers: Sequence[Layer], uses: Uses) -> Iterator[str]:
    """A remark on modules that seem to convolve and are none of PyTorch's convolutions, by their classes.

    Those convolve with weights that are made of parameters of no layer, or have weights of their own and a
    ``kernel_size``, or ones of the rank of a kernel. The layers are those that are in the report.
    """
    names = [layer.name for layer in layers]
    found, inside = Counter[str](), tuple(f"{name}." for name in names)
    kernels = set[int]()
    known = {id(p) for one in tree.modules(model) if isinstance(one, _ConvNd) for p in tree.parameters(one)}
    known |= {id(source) for layer in layers for source in layer.weight.sources}
    parameters = {id(one): one for one in tree.parameters(model) if not is_lazy(one)}
    others = parameters.keys() - known
    several = {one for one in others if parameters[one].dim() > 1}
    for name, module in tree.named_modules(model):
        bare = bare_name(name)
        if isinstance(module, _ConvNd) or bare in names or f"{bare}.".startswith(inside):
            continue
        named = (one for key, one in module._parameters.items() if "weight" in key or "kernel" in key)
        own = {id(one) for one in named if _is_kernel(module, one)}
        # Convolutions are in the report already. Biases of what makes a weight are no kernels, if it is made of more.
        made = uses.others[name] & others
        own = own & others | (made & several or made)
        kernels |= own
        if own:
            found[type(module).__name__] += 1
    if found:
        share = sum(parameters[one].numel() for one in kernels) / sum(one.numel() for one in parameters.values())
        yield f"not looked at, though they may convolve: {_counted(found)}, with {share:.0%} of the parameters"


def _is_kernel(module: nn.Module, weight: Tensor | None) -> bool:
    """Whether a module may make kernels of a parameter: not of factors of channels, such as ``[M, 1, 1]``."""
    if weight is None or is_lazy(weight):
        return False
    kernels = weight.dim() in KERNEL_RANKS and weight.numel() > max(weight.shape)
    return kernels or tree.has_attribute(module, "kernel_size")


def _counted(kinds: Counter[str]) -> str:
    return some(f"{count} {shown(kind)}" for kind, count in kinds.most_common())


def _arrays(state: Mapping[str, object]) -> Iterator[str]:
    """A remark on entries of the rank of a weight that are no tensors."""
    shapes = {key: getattr(one, "shape", ()) for key, one in state.items() if not isinstance(one, Tensor)}
    found = [key for key, shape in shapes.items() if isinstance(shape, tuple) and len(shape) in KERNEL_RANKS]
    if found:
        yield f"not looked at, for they are no tensors of torch, as torch.from_numpy makes: {some(map(shown, found))}"


def _quantized(model: nn.Module) -> Iterator[str]:
    """A remark on quantized convolutions."""
    found = Counter(type(one).__name__ for one in tree.modules(model) if is_quantized(one))
    if found:
        yield f"not looked at, for their weights are quantized: {_counted(found)}"


def _from_elsewhere(uses: Uses, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Remarks on convolutions outside the model, and on what changes or replaces weights and was not tried for it."""
    if uses.outside:
        yield f"not looked at, for they are no parts of the model: convolutions that {_names(uses.outside)} calls"
    passes, hooks = set[str](), set[str]()
    for layer, found in uses.of.items():
        for by, how, hook in found:
            if how != CALLED and hook and (hook == AFTER or by not in (owner_of(layer, modules), layer)):
                hooks.add(by)
            elif how != CALLED and not hook and not _holds(modules[by], modules[layer]):
                passes.add(by)
    if hooks:
        yield f"not tried, though they may change weights of others or later: hooks of {_names(hooks)}"
    if passes:
        yield f"not tried, though they may use other weights: the forward passes of {_names(passes)}"


def _names(modules: Iterable[str]) -> str:
    return some(layer_name(bare_name(name)) for name in sorted(modules))


def _holds(owner: nn.Module, part: nn.Module) -> bool:
    """Whether a module has another one as a child or in its lists, or is it."""
    lists = (nn.ModuleList, nn.ModuleDict)
    inside = (_holds(one, part) if isinstance(one, lists) else one is part for _, one in tree.named_children(owner))
    return owner is part or any(inside)


def _used_elsewhere(modules: Mapping[str, nn.Module], layers: Sequence[Layer], uses: Uses) -> Iterator[str]:
    """A remark on modules that hold a convolution which others hold too, where they may use another weight of it."""
    weights = {layer.name: layer.weight for layer in layers if layer.obstacle is None}
    found = []
    for name, its in uses.of.items():
        weight, module, owner = weights.get(bare_name(name)), modules[name], owner_of(name, modules)
        if weight is None or all(use.how == CALLED for use in its):
            continue
        for by in sorted({use.by for use in its} - {owner, name}):
            if _holds(modules[by], module):
                use = used_weight(cast(_ConvNd, module), modules[by], uses.by(by, name))
                if _may_differ(use, weight, module):
                    found.append(f"{layer_name(bare_name(name))} (in {layer_name(bare_name(by))})")
    if found:
        yield f"held by other modules too, which may use other weights, and those do not count: {some(found)}"


@torch.no_grad()
def _may_differ(use: Weight, weight: Weight, module: nn.Module) -> bool:
    """Whether a use of a convolution may be one of another weight, which the module around it makes."""
    if not any(isinstance(one, ForwardWeight) and one.module is not module for one in (use, weight)):
        return use.note not in (None, weight.note)
    try:
        return not torch.equal(use.read(), weight.read())
    except Exception:  # whatever the module's own code raises
        return True


def _ties(entries: Iterable[tuple[str, object]], layers: Sequence[Layer]) -> Iterator[str]:
    """A remark on those tensors that are no convolution's and lie in the memory of a layer's that is treated."""
    own = {id(one) for layer in layers for one in (*layer.weight.sources, *layer.weight.storage().values())}
    treated = memories(source for layer in layers if layer.obstacle is None for source in layer.weight.sources)
    # What overlaps with a tensor starts before its end, and at most the longest before its start.
    treated.sort(key=attrgetter("start"))
    starts, longest = [one.start for one in treated], max((one.end - one.start for one in treated), default=0)
    found = []
    for name, tensor in entries:
        for one in memories([tensor]) if isinstance(tensor, Tensor) and id(tensor) not in own else ():
            near = treated[bisect_left(starts, one.start - longest) : bisect_left(starts, one.end)]
            if any(overlap(one, other) for other in near):
                found.append(shown(bare_name(name)))
    if found:
        yield f"in the memory of weights of layers, and change with them: {some(found)}"


@holding_weights_lock()
@torch.no_grad()
def watch_copies(model: nn.Module | Mapping[str, object], layers: Sequence[Layer]) -> Callable[[], list[str]]:
    """A function that remarks, once layers are treated, on copies of their weights that are no longer equal to them.

    These are frozen or loaded layers, as momentum encoders, layers that are treated in another way, other parameters,
    buffers, and what attributes hold, as averages of weights; in a state dict entries that are no layer's.
    """
    treated: dict[tuple[int, ...], list[tuple[str, Tensor]]] = {}
    copies: list[tuple[str, Tensor]] = []
    for layer in layers:
        source = layer.weight.sources[0]
        if layer.obstacle is None:
            treated.setdefault(tuple(source.shape), []).append((layer_name(layer.name), source))
            copies.append((layer_name(layer.name), source))
        elif layer.is_left_for(*KEPT) and len(memories(layer.weight.sources)) == len(layer.weight.sources):
            copies.append((layer_name(layer.name), source))
    known = {id(one) for layer in layers for one in layer.weight.storage().values()}
    for name, tensor in _tensors_of(unwrap(model)) if isinstance(model, nn.Module) else model.items():
        if not isinstance(tensor, Tensor) or id(tensor) in known:
            continue
        # In this order, as a lazy tensor raises an error when it is asked for its rank.
        if memories([tensor]) and tensor.dim() in KERNEL_RANKS:
            copies.append((shown(bare_name(name)), tensor))
            known.add(id(tensor))
    twins = []
    for name, copy in copies:
        # A layer that is treated is a copy of the first that is equal to it, which may be itself.
        others = treated.get(tuple(copy.shape), ())
        of = next((one for one in others if one[1] is copy or _same(copy, one[1])), None)
        twins += [(name, copy, *of)] if of and of[1] is not copy else []
    return lambda: copies_remark([(name, of) for name, copy, of, source in twins if not _same(copy, source)])


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model, each once; those that attributes hold by the names of the attributes."""
    named = [*tree.named_parameters(model), *tree.named_buffers(model)]
    for name, part in tree.named_modules(model):
        for key, value in vars(part).items():
            if key not in USUAL:
                named += ((f"{name}.{key}".lstrip("."), tensor) for tensor in tensors_in(value, NEAR))
    found = dict[int, tuple[str, Tensor]]()
    for name, tensor in named:  # of several names the first
        found.setdefault(id(tensor), (name, tensor))
    yield from found.values()


def copies_remark(parted: Sequence[tuple[str, str]]) -> list[str]:
    """A remark on copies that are no longer equal, by their names and those of what they were copied from."""
    if not parted:
        return []
    names = some(f"{copy} (of {original})" for copy, original in parted)
    return [f"copies that are no longer equal to what they were copied from: {names}: copy them again"]


def _same(copy: Tensor, original: Tensor) -> bool:
    alike = copy.device == original.device and copy.is_floating_point() and converts(copy.dtype)
    # What is no copy differs in its first row already, nearly always.
    pairs = [*([(copy[:1], original[:1])] if copy.dim() else []), (copy, original)]
    return alike and all(torch.equal(one, other.to(one.dtype)) for one, other in pairs)
