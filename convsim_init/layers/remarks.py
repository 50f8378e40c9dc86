"""What a report should say of a model beside its layers: what was not looked at, and copies that part."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from convsim_init.layers import tree
from convsim_init.layers.code.around import (
    has_attribute,
    hooks_elsewhere,
    is_quantized,
    kept_outside,
    reads_further_inside,
)
from convsim_init.layers.code.held import is_plain
from convsim_init.layers.code.reading import forward_code
from convsim_init.layers.find import used_weight
from convsim_init.layers.forward.isolation import one_at_a_time
from convsim_init.layers.forward.weight import ForwardWeight
from convsim_init.layers.layer import Layer
from convsim_init.layers.memory import memories, overlap
from convsim_init.layers.names import bare_name, unwrap
from convsim_init.layers.stored import has_unknown_hook
from convsim_init.layers.weights import KERNEL_RANKS, Weight
from convsim_init.report.text import layer_name, shown, some

Holder = tuple[str, nn.Module, str]  # a module's name, the module, and the name of what it holds in it
USUAL = frozenset(vars(nn.Module()))  # attributes of every module
COPIES = ("frozen", "loaded")  # what the obstacle of a copy begins with


@one_at_a_time
def model_remarks(model: nn.Module | Mapping[str, object], layers: Sequence[Layer]) -> list[str]:
    """Remarks on a model, or a state dict, that its layers' reports do not make."""
    if not isinstance(model, nn.Module):
        return _arrays(model)
    inner = unwrap(model)
    names = [layer.name for layer in layers]
    return [
        *_other_kernels(inner, names),
        *_quantized(inner),
        *_kept(inner),
        *_hooks_around(inner),
        *_read_above(inner),
        *_used_elsewhere(inner, layers),
        *_ties(inner, layers),
    ]


def _other_kernels(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Remarks on modules that seem to convolve and are none of PyTorch's convolutions, by their classes.

    Those have a ``kernel_size`` and weights of their own, or a weight of the rank of a kernel, or their
    code names a convolution.

    Args:
        model: Model without wrappers.
        names: Names of the layers that are in the report.
    """
    found, inside = Counter[str](), tuple(f"{name}." for name in names)
    weights: dict[int, int] = {}
    for name, module in tree.named_modules(model):
        bare = bare_name(name)
        if isinstance(module, _ConvNd) or bare in names or f"{bare}.".startswith(inside):
            continue
        own = _convolved_with(module)
        if own:
            found[type(module).__name__] += 1
            weights |= {id(one): one.numel() for one in own}
    if not found:
        return []
    share = sum(weights.values()) / sum(one.numel() for one in tree.parameters(model) if not is_lazy(one))
    kinds = some(f"{count} {shown(kind)}" for kind, count in found.most_common())
    return [f"not looked at, though they may convolve: {kinds}, with {share:.0%} of the parameters"]


def _convolved_with(module: nn.Module) -> list[nn.Parameter]:
    """The parameters, none of a convolution of PyTorch's, that a module may make kernels of."""
    code = forward_code(module)
    known = {id(p) for one in tree.modules(module) if isinstance(one, _ConvNd) for p in tree.parameters(one)}
    own = {key: one for key, one in module._parameters.items() if one is not None and not is_lazy(one)}
    found = [one for key, one in own.items() if "weight" in key or (code.convolves and one.dim() > 1)]
    found = [one for one in found if id(one) not in known]
    found = [one for one in found if has_attribute(module, "kernel_size") or one.dim() in KERNEL_RANKS]
    if found or not code.convolves or isinstance(module, (fx.GraphModule, torch.jit.ScriptModule)):
        return found  # a graph's calls are known
    if known and code.takes_weights:
        return []  # it calls a convolution with the weight of one inside it
    return [one for one in tree.parameters(module) if not is_lazy(one) and one.dim() > 1 and id(one) not in known]


def _arrays(state: Mapping[str, object]) -> list[str]:
    """A remark on entries of the rank of a weight that are no tensors."""
    shapes = {key: getattr(one, "shape", ()) for key, one in state.items() if not isinstance(one, Tensor)}
    found = [key for key, shape in shapes.items() if isinstance(shape, tuple) and len(shape) in KERNEL_RANKS]
    if not found:
        return []
    return [f"not looked at, for they are no tensors of torch, as torch.from_numpy makes: {some(map(shown, found))}"]


def _quantized(model: nn.Module) -> list[str]:
    """A remark on quantized convolutions."""
    found = Counter(type(one).__name__ for one in tree.modules(model) if is_quantized(one))
    if not found:
        return []
    kinds = some(f"{count} {shown(kind)}" for kind, count in found.most_common())
    return [f"not looked at, for their weights are quantized: {kinds}"]


def _kept(model: nn.Module) -> list[str]:
    """A remark on convolutions that plain lists, objects or functions hold and a forward pass uses."""
    parts = dict(tree.named_modules(model))
    known = set(map(id, parts.values()))
    found = [
        f"{bare_name(name)}.{one}".lstrip(".") for name, part in parts.items() for one in kept_outside(part, known)
    ]
    if not found:
        return []
    return [f"not looked at, for they are no parts of the model: the convolutions in {some(map(shown, found))}"]


def _hooks_around(model: nn.Module) -> list[str]:
    """Remarks on hooks that may change the weights of other convolutions than those that a trial pass is made for."""
    around, elsewhere = list[str](), list[str]()
    for name, module in tree.named_modules(model):
        children = (child for _, child in tree.named_children(module))
        if has_unknown_hook(module) and any(
            isinstance(one, _ConvNd) for child in children for one in list(tree.modules(child))[1:]
        ):
            around.append(layer_name(bare_name(name)))
        elif hooks_elsewhere(module):
            elsewhere.append(layer_name(bare_name(name)))
    remarks = []
    if around:
        remarks.append(f"not tried, though they may change weights: hooks before the forward pass of {some(around)}")
    if elsewhere:
        remarks.append(f"not tried, though they may change weights of others or later: hooks of {some(elsewhere)}")
    return remarks


def _read_above(model: nn.Module) -> list[str]:
    """A remark on forward passes that may use other weights of convolutions further inside than is tried."""
    found = [layer_name(bare_name(name)) for name, module in tree.named_modules(model) if reads_further_inside(module)]
    return [f"not tried, though they may use other weights: the forward passes of {some(found)}"] if found else []


def _used_elsewhere(model: nn.Module, layers: Sequence[Layer]) -> list[str]:
    """A remark on modules that hold a convolution which others hold too, where they may use another weight of it."""
    parents: dict[nn.Module, list[Holder]] = {}
    for name, owner in tree.named_modules(model):
        for key, child in owner._modules.items():
            if child is not None:
                parents.setdefault(child, []).append((name, owner, key))
    weights = {layer.name: layer.weight for layer in layers if layer.obstacle is None}
    found = []
    for full, module in tree.named_modules(model):
        weight = weights.get(bare_name(full))
        if isinstance(module, _ConvNd) and weight is not None and len(held := list(_holders(parents, module))) > 1:
            uses = [(name, used_weight(module, owner, inner)) for name, owner, inner in held]
            others = [layer_name(bare_name(name)) for name, use in uses if _may_differ(use, weight, module)]
            found += [f"{layer_name(bare_name(full))} (in {one})" for one in dict.fromkeys(others)]
    if not found:
        return []
    return [f"held by other modules too, which may use other weights, and those do not count: {some(found)}"]


def _holders(parents: Mapping[nn.Module, Sequence[Holder]], part: nn.Module, inner: str = "") -> Iterator[Holder]:
    """The modules with a forward pass that a module is in, or is in a list of."""
    for name, owner, key in parents.get(part, ()):
        path = f"{key}.{inner}".rstrip(".")
        if isinstance(owner, (nn.ModuleList, nn.ModuleDict)):
            yield from _holders(parents, owner, path)
        else:
            yield name, owner, path


@torch.no_grad()
def _may_differ(use: Weight, weight: Weight, module: nn.Module) -> bool:
    """Whether a use of a convolution may be one of another weight, which the module around it makes."""
    if not any(isinstance(one, ForwardWeight) and one.module is not module for one in (use, weight)):
        return use.note not in (None, weight.note)
    try:
        return not torch.equal(use.read(), weight.read())
    except Exception:  # whatever the module's own code raises
        return True


def _ties(model: nn.Module, layers: Sequence[Layer]) -> list[str]:
    """A remark on tensors that are no convolution's and lie in the memory of a layer's that is treated."""
    own = {id(source) for layer in layers for source in layer.weight.sources}
    treated = memories(source for layer in layers if layer.obstacle is None for source in layer.weight.sources)
    treated.sort(key=attrgetter("start"))
    starts, longest = [one.start for one in treated], max((one.end - one.start for one in treated), default=0)
    found = []
    for name, tensor in (*tree.named_parameters(model), *tree.named_buffers(model)):
        for one in memories([tensor]) if id(tensor) not in own else ():
            near = treated[bisect_left(starts, one.start - longest) : bisect_left(starts, one.end)]
            if any(overlap(one, other) for other in near):
                found.append(shown(bare_name(name)))
    return [f"in the memory of weights of layers, and change with them: {some(found)}"] if found else []


class Twin(NamedTuple):
    """A tensor with the values of one that is treated.

    Attributes:
        name: What it is.
        of: Name of the treated layer.
        copy: The tensor itself.
        original: The layer's.
    """

    name: str
    of: str
    copy: Tensor
    original: Tensor


@one_at_a_time
@torch.no_grad()
def find_twins(model: nn.Module | Mapping[str, object], layers: Sequence[Layer]) -> list[Twin]:
    """Copies of treated weights, in whatever dtype, that are not treated.

    These are frozen or loaded layers, as momentum encoders, other parameters, buffers, and what attributes hold, as
    averages of weights; in a state dict entries that are no layer's.
    """
    treated: dict[tuple[int, ...], list[tuple[str, Tensor]]] = {}
    copies: list[tuple[str, Tensor]] = []
    for layer in layers:
        source = layer.weight.sources[0]
        if layer.obstacle is None:
            treated.setdefault(tuple(source.shape), []).append((layer_name(layer.name), source))
        elif layer.obstacle.startswith(COPIES) and len(memories(layer.weight.sources)) == len(layer.weight.sources):
            copies.append((layer_name(layer.name), source))
    known = {id(one) for layer in layers for one in layer.weight.storage()}
    for name, tensor in _tensors_of(unwrap(model)) if isinstance(model, nn.Module) else model.items():
        if (
            isinstance(tensor, Tensor)
            and id(tensor) not in known
            and memories([tensor])
            and tensor.dim() in KERNEL_RANKS
        ):
            copies.append((shown(bare_name(name)), tensor))
            known.add(id(tensor))
    found = []
    for name, copy in copies:
        of = next((one for one in treated.get(tuple(copy.shape), ()) if _same(copy, one[1])), None)
        found += [Twin(name, of[0], copy, of[1])] if of else []
    return found


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model, those that attributes hold by the names of the attributes."""
    yield from (*tree.named_parameters(model), *tree.named_buffers(model))
    for name, part in tree.named_modules(model):
        for key, value in vars(part).items():
            if key not in USUAL:
                yield from ((f"{name}.{key}".lstrip("."), tensor) for tensor in _held(value))


def _held(value: object, depth: int = 2) -> Iterator[Tensor]:
    """The tensors that an attribute is, or has in a container, or in the attributes of an object."""
    if isinstance(value, Tensor):
        yield value
    elif depth and not isinstance(value, nn.Module):
        inside = value if isinstance(value, (list, tuple, dict)) else vars(value) if is_plain(value) else ()
        for one in list(inside.values()) if isinstance(inside, dict) else inside:
            yield from _held(one, depth - 1)


def divergence_remarks(twins: Sequence[Twin]) -> list[str]:
    """A remark on those twins that are no longer equal."""
    return copies_remark([(twin.name, twin.of) for twin in twins if not _same(twin.copy, twin.original)])


def copies_remark(parted: Sequence[tuple[str, str]]) -> list[str]:
    """A remark on copies that are no longer equal, by their names and those of what they were copied from."""
    if not parted:
        return []
    names = some(f"{copy} (of {original})" for copy, original in parted)
    return [f"copies that are no longer equal to what they were copied from: {names}: copy them again"]


def _same(copy: Tensor, original: Tensor) -> bool:
    alike = copy.device == original.device and copy.is_floating_point()
    return alike and torch.equal(copy, original.to(copy.dtype))
