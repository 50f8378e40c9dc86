"""Forward passes of a model, or where it cannot run as a whole of its parts, on unknown values: what is called in them.

They are those of a copy on the meta device, so that nothing of the model itself is changed. Hooks run as in a real
forward pass. Arguments with a default have it, where all convolutions are called so.
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
from convsim_init.layers.forward.copies import is_librarys
from convsim_init.layers.forward.isolation import holding_weights_lock, random_states, running
from convsim_init.layers.symbolic.clone import on_meta
from convsim_init.layers.symbolic.kept import without_unknown_values
from convsim_init.layers.symbolic.kinds import SHAPES, USING
from convsim_init.layers.symbolic.passes import SAMPLE, SymbolicPass
from convsim_init.layers.symbolic.symbols import Node

_following: list[nn.Module] = []  # the model whose forward passes run now, if any; only the lock's holder looks


@dataclass
class Followed:
    """What was called in the forward passes of a model."""

    modules: dict[str, nn.Module] = field(default_factory=dict)  # of the model, by their names
    names: dict[int, str] = field(default_factory=dict)  # by the ids of modules and parameters, of the copy too
    originals: dict[int, int] = field(default_factory=dict)  # ids of the model's parameters, by those of the copy's
    failed: set[str] = field(default_factory=set)  # modules whose code raised errors: how they use others is unknown
    runs: list[tuple[list[Node], bool]] = field(default_factory=list)  # calls, the last the output; if of the whole

    def layers(self, node: Node) -> set[str]:
        """The layers that a call is one of, by their names."""
        if isinstance(node.module, _ConvNd):
            return {self.names[id(node.module)]}
        return {self.names[one] for one in kernels(node) if one in self.names}


def origins(node: Node, most: float = math.inf) -> set[Node]:
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


def kernels(node: Node) -> set[int]:
    """The parameters that the weight of a convolution is made of, by their ids."""
    made_of = origins(node.weight) if node.weight else ()
    return set().union(*(one.learned for one in made_of))


@holding_weights_lock()
def follow(model: nn.Module) -> Followed:
    """Run the forward passes of a model without wrappers, which is left as it was, as are the random states.

    All fails in one that cannot be copied, and nothing is found in what a hook looks at while it is followed itself.
    """
    followed = Followed(dict(tree.named_modules(model)))
    # What is printed tells of values that are not there.
    with torch.no_grad(), random_states(()), redirect_stdout(_Muted(sys.stdout)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if _following:
            return followed
        _following.append(model)
        try:
            with running(()), without_unknown_values(list(tree.modules(model))):  # of a copy that is yet to be made
                _follow(model, followed)
        except Exception:  # of any kind: what cannot be copied
            followed.failed = {name for name, module in followed.modules.items() if _has_forward(module)}
        finally:
            _following.pop()
    return followed


class _Muted:
    """Standard output without what this thread prints."""

    def __init__(self, output: Any) -> None:
        self._output, self._thread = output, threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._output, name)

    def write(self, text: str) -> int:
        """Write what another thread prints."""
        return len(text) if threading.get_ident() == self._thread else self._output.write(text)


def _follow(model: nn.Module, followed: Followed) -> None:
    clone = on_meta(model)
    for one in (model, clone):
        followed.names |= _names(one)
    # A deep copy keeps the order of parameters, and shared ones stay shared: so they pair up.
    both = zip(tree.parameters(clone), tree.parameters(model), strict=True)
    followed.originals = {id(twin): id(one) for twin, one in both}
    # Numbers that code makes for its input, and may keep, are to be of the model's dtype and device.
    like = next((one for one in tree.parameters(model) if one.is_floating_point()), SAMPLE)
    passes = SymbolicPass(clone, torch.empty(0, 0, dtype=like.dtype, device=like.device))
    _run(passes, clone, followed, set())
    failed = {followed.names[id(one)] for one in passes.failed}
    followed.failed = {name for name in failed if _has_forward(followed.modules[name])}
    followed.failed |= {followed.names[id(one)] for one in passes.failed_hooks}


def _names(model: nn.Module) -> dict[int, str]:
    # From the last, so that of several modules that hold a parameter the first names it.
    modules = list(tree.named_modules(model))[::-1]
    convolutions = [(name, one) for name, one in modules if isinstance(one, _ConvNd)]
    return {
        id(one): name.partition(".parametrizations.")[0]
        for name, module in (*modules, *convolutions)  # the last one that holds a parameter counts
        for one in (module, *(one for one in module._parameters.values() if one is not None and not is_lazy(one)))
    }


def _has_forward(module: nn.Module) -> bool:
    """Whether a module has a forward pass that is not PyTorch's."""
    own = "forward" in vars(module) or getattr_static(type(module), "forward") is not nn.Module.forward
    return own and not is_librarys(type(module))


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
        failed = part in passes.failed or any(one in passes.failed for one in tree.modules(child))
        if failed or not _convolutions(child, followed) <= seen:
            _run(passes, child, followed, seen, whole=False)


def _convolutions(part: nn.Module, followed: Followed) -> set[str]:
    return {followed.names[id(one)] for one in tree.modules(part) if isinstance(one, _ConvNd)}


def _arguments(part: nn.Module) -> Iterator[list[str]]:
    """Which arguments a forward pass may be given: those without a default; with them others, one, two or all.

    Those that it takes besides, as by ``*args``, are given at first only where it has no others without a default.
    """
    try:
        parameters = inspect.signature(part.forward).parameters.values()
    except (TypeError, ValueError):  # a function without one
        return
    named = [one for one in parameters if one.kind is not inspect.Parameter.VAR_KEYWORD]
    without = [one for one in named if one.default is inspect.Parameter.empty]
    needed = [one.name for one in without if one.kind is not inspect.Parameter.VAR_POSITIONAL]
    needed = needed or [one.name for one in without]
    others = [one.name for one in named if one.name not in needed and (one.default is None or one in without)]
    extras = [[], *([one] for one in others), *([others[0], one] for one in others[1:])]
    extras += [others] if len(others) > 1 else []
    yield from ([*needed, *extra] for extra in extras if needed or extra)
