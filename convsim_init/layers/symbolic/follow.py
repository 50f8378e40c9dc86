"""The calls in symbolic forward passes of a model, or of its parts if it cannot run as a whole.

The passes are those of a copy on the meta device, so that the model itself is not changed. Hooks run as in a real
forward pass. Arguments keep their defaults, unless some convolutions are only called with other values.
"""

from __future__ import annotations

import inspect
import math
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from inspect import getattr_static
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from convsim_init.layers import tree
from convsim_init.layers.forward.code import is_from_library
from convsim_init.layers.forward.isolation import holding_weights_lock, is_running, random_states, running
from convsim_init.layers.symbolic.clone import on_meta
from convsim_init.layers.symbolic.kept import without_unknown_values
from convsim_init.layers.symbolic.kinds import SHAPES, USING
from convsim_init.layers.symbolic.passes import SAMPLE, SymbolicPass
from convsim_init.layers.symbolic.symbols import Node


@dataclass
class Followed:
    """What was called in the forward passes of a model."""

    modules: dict[str, nn.Module] = field(default_factory=dict)  # of the model, by name
    names: dict[int, str] = field(default_factory=dict)  # of modules and parameters by id, including those of the copy
    originals: dict[int, int] = field(default_factory=dict)  # ids of the model's parameters, by those of the copy's
    failed: set[str] = field(default_factory=set)  # modules whose code raised errors: how they use others is unknown
    runs: list[tuple[list[Node], bool]] = field(default_factory=list)  # calls, the output last; if of the whole model

    def layers(self, node: Node) -> set[str]:
        """The names of the layers whose module or weight a call uses as a convolution."""
        if isinstance(node.module, _ConvNd):
            return {self.names[id(node.module)]}
        return {self.names[key] for key in kernels(node) if key in self.names}


def origins(node: Node, limit: float = math.inf) -> set[Node]:
    """All calls that a value is computed from by functions, with its own, back to calls of modules and arguments.

    Sizes are left out. The search ends once it has found more calls than the limit.
    """
    found, pending = {node}, [node]
    for call in pending:  # grows in the loop
        if len(found) > limit:
            break
        if call.module is None and call.name not in USING | SHAPES:
            new = {before for before in call.inputs if not before.is_size} - found
            found |= new
            pending += new
    return found


def kernels(node: Node) -> set[int]:
    """The ids of the parameters that the weight of a convolution is made of."""
    made_of = origins(node.weight) if node.weight else ()
    return set().union(*(origin.learned for origin in made_of))


@holding_weights_lock()
def follow(model: nn.Module) -> Followed:
    """Run the forward passes of an unwrapped model symbolically; the model and the random states stay as they are.

    If the model cannot be copied, every module counts as failed. A call from code that runs in such a pass, or in a
    trial pass, finds nothing.
    """
    followed = Followed(dict(tree.named_modules(model)))
    if is_running():
        return followed
    # Prints of the model's code would show values that do not exist.
    with torch.no_grad(), random_states(()), redirect_stdout(_Muted(sys.stdout)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # No modules are locked, because the passes are those of a copy.
            with running(()), without_unknown_values(list(tree.modules(model))):
                _follow(model, followed)
        except Exception:  # of any kind, from a model that cannot be copied
            followed.failed = {name for name, module in followed.modules.items() if _has_forward(module)}
    return followed


class _Muted:
    """Standard output that drops the prints of the thread that made it."""

    def __init__(self, output: Any) -> None:
        self._output, self._thread = output, threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._output, name)

    def write(self, text: str) -> int:
        """Write text of another thread."""
        return len(text) if threading.get_ident() == self._thread else self._output.write(text)


def _follow(model: nn.Module, followed: Followed) -> None:
    clone = on_meta(model)
    followed.names = _names(model) | _names(clone)
    # A deep copy keeps the order of parameters, and shared ones stay shared, so they pair up.
    pairs = zip(tree.parameters(clone), tree.parameters(model), strict=True)
    followed.originals = {id(twin): id(parameter) for twin, parameter in pairs}
    # Tensors that code creates like its input, and may keep, should have the model's dtype and device.
    like = next((parameter for parameter in tree.parameters(model) if parameter.is_floating_point()), SAMPLE)
    passes = SymbolicPass(clone, torch.empty(0, 0, dtype=like.dtype, device=like.device))
    _run(passes, clone, followed, set())
    failed = {followed.names[id(module)] for module in passes.failed}
    followed.failed = {name for name in failed if _has_forward(followed.modules[name])}
    followed.failed |= {followed.names[id(module)] for module in passes.failed_hooks}


def _names(model: nn.Module) -> dict[int, str]:
    """Names by id: of modules, and for a parameter that of a convolution that holds it, or else of the first module."""
    # The last entry for a key stays, hence the reversed order and the convolutions at the end.
    modules = list(tree.named_modules(model))[::-1]
    convolutions = [(name, module) for name, module in modules if isinstance(module, _ConvNd)]
    return {
        id(value): name.partition(".parametrizations.")[0]
        for name, module in (*modules, *convolutions)
        for value in (module, *(p for p in module._parameters.values() if p is not None and not is_lazy(p)))
    }


def _has_forward(module: nn.Module) -> bool:
    """Whether a module has a forward pass that is not PyTorch's."""
    own = "forward" in vars(module) or getattr_static(type(module), "forward", None) not in (None, nn.Module.forward)
    return own and not is_from_library(type(module))


def _run(passes: SymbolicPass, part: nn.Module, followed: Followed, seen: set[str], *, whole: bool = True) -> None:
    """Run a part of the model, then the parts of it whose convolutions were not called or whose code failed."""
    convolutions = _convolutions(part, followed)
    for number, (usual, given) in enumerate(product((True, False), _arguments(part))):
        if number and convolutions <= seen and part not in passes.failed:
            break
        nodes = passes.run(part, given, usual=usual)
        followed.runs.append((nodes, whole))
        seen |= set().union(*map(followed.layers, nodes))
    for _, child in tree.named_children(part):
        failed = part in passes.failed or any(module in passes.failed for module in tree.modules(child))
        if failed or not _convolutions(child, followed) <= seen:
            _run(passes, child, followed, seen, whole=False)


def _convolutions(part: nn.Module, followed: Followed) -> set[str]:
    return {followed.names[id(module)] for module in tree.modules(part) if isinstance(module, _ConvNd)}


def _arguments(part: nn.Module) -> Iterator[list[str]]:
    """The names of arguments to give to a forward pass, in the order to try: at first those without a default.

    Then others are added: each alone, each with the first of them, and all. Others are arguments that default to None,
    and ``*args`` unless that is the only argument without a default.
    """
    try:
        parameters = inspect.signature(part.forward).parameters.values()
    except (TypeError, ValueError):  # raised by a function without a signature
        return
    named = [p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    without_default = [p for p in named if p.default is inspect.Parameter.empty]
    needed = [p.name for p in without_default if p.kind is not inspect.Parameter.VAR_POSITIONAL]
    needed = needed or [p.name for p in without_default]
    others = [p.name for p in named if p.name not in needed and (p.default is None or p in without_default)]
    extras = [[], *([name] for name in others), *([others[0], name] for name in others[1:])]
    extras += [others] if len(others) > 1 else []
    yield from ([*needed, *extra] for extra in extras if needed or extra)
