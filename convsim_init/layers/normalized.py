"""Which channels are compared: it depends on whether a normalization follows before another layer.

That is told by a symbolic trace of the model (`torch.fx`), which needs no input; arguments with a default have
it. Traced is a copy on the meta device without hooks, so that nothing of the model itself is changed. Where the
whole cannot be traced its parts are, one by one; of a layer whose output leaves such a part nothing is known.
"""

from __future__ import annotations

import copy
import inspect
import io
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import permutations
from types import MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from convsim_init.layers.forward.code import forward_code
from convsim_init.layers.forward.isolation import LIVE, copied, heavy_attributes, random_states
from convsim_init.layers.layer import Layer
from convsim_init.layers.names import bare_name, unwrap
from convsim_init.settings import Settings

NORMALIZATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
NAMED = re.compile(r"(?<!No)(?<!FrozenBatch)Norm(alization)?(?![a-z]|Free)")  # such as LayerNorm2d, no NormalNoise
NORMALIZING = {f"{kind}_norm" for kind in ("batch", "layer", "group", "instance", "rms")}  # names of functions
NORMALIZING |= {"native_batch_norm", "native_layer_norm", "native_group_norm", "normalize"}
STATISTICS = {"var", "std", "var_mean", "std_mean", "sqrt", "rsqrt", "norm", "vector_norm"}
SCALING = {"mul", "multiply", "div", "divide", "truediv", "true_divide"}
PRODUCTS = {"matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "tensordot"}
USERS = (_ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase)
SHAPE = {"size", "dim", "shape", "ndim"}  # what is asked of a tensor without its values
USING = {"linear", "bilinear", *(f"conv{kind}{rank}d" for kind in ("", "_transpose") for rank in (1, 2, 3))}
DEEP = (nn.Module, Tensor, dict, list, set, tuple, MethodType)  # what a deep copy of the model copies by itself
LONGEST = 20_000  # calls in a trace
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
            filters = layer.shape[1] if layer.transposed else layer.shape[0] // layer.groups
            if normalized is False and filters > 1:
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
    # A trace replaces `nn.Module.__call__` for its time, and what is printed then tells of values that are not there.
    with LIVE, torch.no_grad(), random_states(()), redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return {bare_name(name): known for name, known in _followed(_on_meta(model), "", whole=True)}
        except Exception:  # of any kind: what cannot be copied
            return {}


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy whose tensors have no data, without hooks.

    Attributes that cannot be copied, or are too heavy, it shares with the model.
    """
    memo: dict[int, Any] = {}
    parts = list(model.modules())
    for part in parts:
        for name, value in vars(part).items():
            if "hooks" in name and isinstance(value, dict):
                memo[id(value)] = type(value)()
        for tensor in (*part._parameters.values(), *part._buffers.values(), *vars(part).values()):
            if isinstance(tensor, Tensor) and not is_lazy(tensor):
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
    for part in clone.modules():
        vars(part)["training"] = False
    return clone


def _followed(part: nn.Module, path: str, *, whole: bool) -> Iterator[tuple[str, bool]]:
    """The convolutions of a part of the model of which it is known, by their names; and whether one follows."""
    try:
        nodes = list(_Tracer().trace(part, _defaults(part) if whole else None).nodes)
    except (Exception, SystemExit):  # of any kind: what its code does with values that are not there
        for name, child in part.named_children():
            yield from _followed(child, f"{path}{name}.", whole=False)
        return
    ends: dict[fx.Node, set[bool | None]] = {}  # of all ways from a node: normalized, used without it, not known
    calls: dict[str, set[bool | None]] = {}
    for node in reversed(nodes):  # after all that use it
        ends[node] = set[bool | None]().union(*(_end(user, part, whole=whole) or ends[user] for user in node.users))
        if node.target in SHAPE or (node.target is getattr and node.args[1] in SHAPE):
            ends[node] = set()
        if node.op == "call_module":
            calls.setdefault(str(node.target), set()).update(ends[node])
    for name, found in calls.items():
        module = part.get_submodule(name)
        if isinstance(module, _ConvNd):
            if any(_is_normalization(one) for part, one in module.named_modules() if "parametrizations" not in part):
                found = {True}  # inside it, as in a fused layer of quantization-aware training
            if False in found or found == {True}:
                yield path + name, False not in found


def _end(node: fx.Node, part: nn.Module, *, whole: bool) -> set[bool | None]:
    """How a way through a model ends in that node; empty if it goes on."""
    if node.op == "output":
        return {False if whole else None}
    if node.op == "call_module":
        module = part.get_submodule(str(node.target))
        if isinstance(module, USERS):
            return {False}
        inner = any(isinstance(one, USERS) for one in module.modules())
        return {True} if _is_normalization(module) else {None} if inner else set()
    name = _name(node)
    if name in NORMALIZING or (name in SCALING and _scales_by_a_statistic(node)):
        return {True}
    learned = name in PRODUCTS and any(one.op == "get_attr" for one in _origins(node))
    return {False} if learned or name in USING else set()


def _scales_by_a_statistic(node: fx.Node) -> bool:
    """Whether one factor is a statistic of what the other is computed from, as in ``x / x.std()``."""
    factors = [_origins(one) for one in node.all_input_nodes]
    return any(
        any(_name(origin) in STATISTICS for origin in one) and one & other for one, other in permutations(factors, 2)
    )


def _origins(node: fx.Node) -> set[fx.Node]:
    """What a value is computed from by functions, itself among it, back to the modules and weights that begin it."""
    found, pending = {node}, [node]
    for one in pending:
        if one.op in ("call_function", "call_method") and _name(one) not in USING:
            new = {before for before in one.all_input_nodes if before.op != "placeholder"} - found
            found |= new
            pending += new
    return found


def _name(node: fx.Node) -> object:
    return getattr(node.target, "__name__", node.target)


def _defaults(part: nn.Module) -> dict[str, Any]:
    """The arguments of a forward pass that have a plain default, with it."""
    parameters = inspect.signature(part.forward).parameters.values()
    return {one.name: one.default for one in parameters if isinstance(one.default, (bool, int, float, str, type(None)))}


def _is_normalization(module: nn.Module) -> bool:
    """Whether it is a normalization of PyTorch or, by its name, of somebody else."""
    if isinstance(module, (nn.LocalResponseNorm, nn.Identity)):
        return False
    if isinstance(module, NORMALIZATIONS):
        return True
    inside = module.modules()
    return NAMED.search(type(module).__name__) is not None and not any(
        isinstance(one, USERS) or not USING.isdisjoint(forward_code(one).names) for one in inside
    )


class _Tracer(fx.Tracer):
    """A trace that calls convolutions and normalizations, of whatever class, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Note a call; a trace of too many ends, which may be a loop without end."""
        if len(self.graph.nodes) > LONGEST:
            raise RuntimeError(f"more than {LONGEST} calls")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether what happens inside it is of no interest."""
        return isinstance(m, _ConvNd) or _is_normalization(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Note a call, unless another thread runs a module meanwhile."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)
