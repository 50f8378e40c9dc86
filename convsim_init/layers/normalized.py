"""Which channels are compared: it depends on whether a normalization follows before another layer.

That is told by a forward pass on unknown values, which needs no input; arguments with a default have it, where all
convolutions are called so. It is that of a copy on the meta device without hooks, so that nothing of the model itself
is changed. Where the whole cannot be run its parts are, one by one; of a layer whose output leaves such a part nothing
is known.
"""

from __future__ import annotations

import copy
import inspect
import io
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import permutations, product
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from convsim_init.layers import tree
from convsim_init.layers.code.reading import forward_code
from convsim_init.layers.forward.isolation import LIVE, copied, heavy_attributes, random_states
from convsim_init.layers.forward.symbolic import OUTPUT, Node, SymbolicPass
from convsim_init.layers.layer import Layer
from convsim_init.layers.names import bare_name, unwrap
from convsim_init.settings import Settings

NORMALIZATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
NAMED = re.compile(r"(?<!No)(?<!FrozenBatch)Norm(alization)?(?![a-z]|Free)")  # such as LayerNorm2d, no NormalNoise
NORMALIZING = {f"{kind}_norm" for kind in ("batch", "layer", "group", "instance", "rms")}  # names of functions
NORMALIZING |= {"native_batch_norm", "native_layer_norm", "native_group_norm", "normalize"}
STATISTICS = {
    "var",
    "std",
    "var_mean",
    "std_mean",
    "sqrt",
    "rsqrt",
    "norm",
    "vector_norm",
    "linalg_norm",
    "linalg_vector_norm",
}
MULTIPLYING = {"mul", "multiply"}
DIVIDING = {"div", "divide", "truediv", "true_divide"}
PRODUCTS = {"matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "tensordot"}
USERS = (_ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase)
SHAPES = {"size", "stride", "numel", *(f"{kind}_like" for kind in ("zeros", "ones", "full", "empty", "rand", "randn"))}
SHAPES |= {f"new_{kind}" for kind in ("zeros", "ones", "full", "empty", "tensor")}  # hold nothing of the values
NEAR = 300  # calls in which a value is computed from a statistic and from what that is of
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
USING = {
    "linear",
    "bilinear",
    "convolution",
    *(f"conv{kind}{rank}d" for kind in ("", "_transpose") for rank in (1, 2, 3)),
}
DEEP = (nn.Module, Tensor, dict, list, set, tuple, MethodType)  # what a deep copy of the model copies by itself
NORMALIZED, USED, FUSED, PASSED, UNKNOWN = "normalized", "used", "normalized inside", "passed", "unknown"
ENDS: dict[str, set[bool | None]]  # of ways into the calls of modules, by what they count as
ENDS = {NORMALIZED: {True}, USED: {False}, FUSED: {False}, PASSED: set(), UNKNOWN: {None}}
NOT_NORMALIZED = "channels all: no normalization follows"
NOT_TOLD = "channels matched: whether a normalization follows could not be told"


def decide_channels(
    model: nn.Module | Mapping[str, object], layers: Sequence[Layer], settings: Settings
) -> tuple[dict[str, tuple[Settings, str | None]], list[str]]:
    """The settings of each layer, with its channels matched or all; and what is to be said of the model.

    With ``channels="auto"`` all are compared where no normalization follows. Depthwise layers, which
    have no pairs of filters with matched channels, are left with none.

    Returns:
        The settings of the layers to treat by their names, each with the reason for its channels where
        it is not that a normalization follows; and remarks on the model.
    """
    if settings.channels != "auto":
        return {layer.name: (settings, None) for layer in layers}, []
    told = normalization_follows(unwrap(model)) if isinstance(model, nn.Module) else None
    decided: dict[str, tuple[Settings, str | None]] = {}
    for layer in layers:
        if layer.obstacle is None:
            by_itself = not layer.name  # what it is used in is not there to be asked
            normalized = True if told is None or by_itself else told.get(layer.name)
            if normalized is False and layer.filters > 1:
                decided[layer.name] = replace(settings, channels="all"), NOT_NORMALIZED
            else:
                decided[layer.name] = replace(settings, channels="matched"), NOT_TOLD if normalized is None else None
    return decided, [] if told is not None else [f"{NOT_TOLD} from a state dict: the model itself tells it"]


def normalization_follows(model: nn.Module) -> dict[str, bool]:
    """Of each convolution whether a normalization follows on every way to another layer or to the output.

    Activations, pooling, sums and concatenations on the way do not count.

    Args:
        model: Model without wrappers; left as it was, as are the random states.

    Returns:
        By the layer's name; layers of which it cannot be told are left out, as is a model that is a
        convolution itself, since what it is used in is not known.
    """
    # What is printed tells of values that are not there.
    with LIVE, torch.no_grad(), random_states(()), redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            clone = _on_meta(model)
            told = dict(_followed(SymbolicPass(clone, call_name), clone, set()))
        except Exception:  # of any kind: what cannot be copied
            return {}
    return {bare_name(name): known for name, known in told.items() if name}


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy whose tensors have no data, without hooks.

    Attributes that cannot be copied, or are too heavy, it shares with the model.
    """
    memo: dict[int, Any] = {}
    parts = list(tree.modules(model))
    for part in parts:
        for name, value in vars(part).items():
            if "hooks" in name and isinstance(value, dict):
                memo[id(value)] = type(value)()
        for tensor in (*part._parameters.values(), *part._buffers.values(), *vars(part).values()):
            if is_lazy(tensor):
                memo[id(tensor)] = tensor
            elif isinstance(tensor, Tensor):
                empty = torch.empty_like(tensor, device="meta")
                memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    for part in parts:
        heavy = heavy_attributes(part, parts)
        for name, value in vars(part).items():
            if name in heavy:
                memo[id(value)] = value
            elif not isinstance(value, DEEP) and id(value) not in memo:
                memo[id(value)] = copied(value, memo)
    clone = copy.deepcopy(model, memo)
    own = set(map(id, parts))
    for part in tree.modules(clone):
        if id(part) in own:  # which the pass would change
            raise TypeError(f"{type(part).__name__} does not let itself be copied")
        vars(part)["training"] = False
    return clone


def _followed(passes: SymbolicPass, part: nn.Module, seen: set[str], path: str = "") -> Iterator[tuple[str, bool]]:
    """The layers of a part of the model of which it is known, by their names; and whether one follows."""
    modules = list(tree.named_modules(part))
    names = {
        id(one): (path + name.partition(".parametrizations.")[0]).rstrip(".")
        for name, module in reversed(modules)
        for one in (module, *(one for one in module._parameters.values() if one is not None and not is_lazy(one)))
    }
    convolutions = {names[id(module)] for _, module in modules if isinstance(module, _ConvNd)}
    for usual, given in product((True, False), _arguments(part)):
        if not convolutions - seen:
            return
        found = ends_of_layers(passes.run(part, given, usual=usual), names, whole=not path)
        for name in found.keys() - seen:
            if False in found[name] or found[name] == {True}:
                yield name, False not in found[name]
        seen |= found.keys()
    if not convolutions - seen:
        return
    for name, child in tree.named_children(part):
        yield from _followed(passes, child, seen, f"{path}{name}.")


def _arguments(part: nn.Module) -> Iterator[list[str]]:
    """Which arguments a forward pass may be given: those without a default; with them others, one, two or all."""
    try:
        parameters = inspect.signature(part.forward).parameters.values()
    except (TypeError, ValueError):  # a function without one
        return
    named = [one for one in parameters if one.kind is not inspect.Parameter.VAR_KEYWORD]
    needed = [one.name for one in named if one.default is inspect.Parameter.empty]
    others = [one.name for one in named if one.default is None]
    yield from ([needed] if needed else [])
    yield from ([*needed, one] for one in others)
    yield from ([*needed, *others[:1], one] for one in others[1:])
    yield from ([[*needed, *others]] if len(others) > 1 else [])


def ends_of_layers(nodes: Sequence[Node], names: Mapping[int, str], *, whole: bool) -> dict[str, set[bool | None]]:
    """How the ways end that begin at each layer: normalized, used without it, or not known."""
    ends: defaultdict[Node, set[bool | None]] = defaultdict(set)
    layers: defaultdict[str, set[bool | None]] = defaultdict(set)
    for node in reversed(nodes):  # after all that use it
        for name in _layers(node, names):
            layers[name] |= {True} if node.name == FUSED else ends[node]
        for before in () if node.name in SHAPES else node.inputs:
            ends[before] |= _end(node, whole=whole) or ends[node]
    return layers


def _layers(node: Node, names: Mapping[int, str]) -> set[str]:
    """The layers that a call is one of, by their names."""
    if isinstance(node.module, _ConvNd):
        return {names[id(node.module)]}
    made_of = _origins(node.weight) if node.weight else ()
    return {names[one] for part in made_of for one in part.learned}


def _end(node: Node, *, whole: bool) -> set[bool | None]:
    """How a way through a model ends in a call; empty if it goes on."""
    if node.name == OUTPUT:
        return {False if whole else None}
    if node.module is not None:
        return ENDS[node.name]
    if node.name in NORMALIZING or _divides_by_a_statistic(node):
        return {True}
    learned = node.name in PRODUCTS and (node.learned or any(map(_is_learned, node.inputs)))
    return {False} if learned or node.name in USING else set()


def _divides_by_a_statistic(node: Node) -> bool:
    """Whether it divides by a statistic of what the other factor is computed from, as in ``x / x.std()``."""
    if node.name not in MULTIPLYING | DIVIDING or len(node.inputs) < 2:
        return False
    factors = [_origins(one, NEAR) for one in node.inputs]
    if node.name in MULTIPLYING:
        pairs = [(one, other) for one, other in permutations(factors, 2) if any(map(_is_inverse, other))]
    else:
        pairs = [(factors[0], factors[1])]
    return any(one & other and any(origin.name in STATISTICS for origin in other) for one, other in pairs)


def _is_inverse(node: Node) -> bool:
    """Whether it is a number or a parameter over a value."""
    of_a_parameter = node.name in DIVIDING and bool(node.learned) and len(node.inputs) == 1
    return of_a_parameter or node.name in ("rsqrt", "reciprocal")


def _is_learned(node: Node) -> bool:
    """Whether a value is computed from parameters alone."""
    return all(one.module is None and (one.inputs or one.learned) for one in _origins(node))


def _origins(node: Node, most: float = math.inf) -> set[Node]:
    """What a value is computed from by functions, itself among it, back to the modules and arguments that begin it.

    Sizes are not among it, nor what is further back than so many calls.
    """
    found, pending = {node}, [node]
    for one in pending:
        if len(found) > most:
            break
        if one.module is None and one.name not in USING | SHAPES:
            new = {before for before in one.inputs if not before.is_size} - found
            found |= new
            pending += new
    return found


def call_name(module: nn.Module) -> tuple[str, bool]:
    """What a module's call counts as, and whether what happens inside it is of no interest."""
    if isinstance(module, _ConvNd):
        return FUSED if any(_is_normalization(child) for _, child in tree.named_children(module)) else USED, True
    if _is_normalization(module):
        return NORMALIZED, True
    if isinstance(module, USERS):
        return USED, True
    if isinstance(module, torch.jit.ScriptModule):
        return UNKNOWN, True
    library = type(module).__module__.startswith(("torch.nn.modules.", "torch.ao.nn."))
    inner = any(isinstance(one, USERS) for one in tree.modules(module))
    return UNKNOWN if inner else PASSED, library and not isinstance(module, CONTAINERS)


def _is_normalization(module: nn.Module) -> bool:
    """Whether it is a normalization of PyTorch or, by its name, of somebody else."""
    if isinstance(module, (nn.LocalResponseNorm, nn.Identity)):
        return False
    if isinstance(module, NORMALIZATIONS):
        return True
    inside = tree.modules(module)
    return NAMED.search(type(module).__name__) is not None and not any(
        isinstance(one, USERS) or not USING.isdisjoint(forward_code(one).names) for one in inside
    )
