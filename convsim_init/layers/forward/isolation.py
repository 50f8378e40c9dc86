"""Contexts in which a live module runs and after which it is as before: for trial passes and for measures on data.

Parameters, buffers, attributes, modes and random states are restored to the bit, whether they were changed in place or
by assignment.
"""

from __future__ import annotations

import math
import operator
import random
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from convsim_init.layers import tree
from convsim_init.layers.forward.code import HOOKS, may_change
from convsim_init.layers.forward.copies import ATOMS, CONTAINERS, copied, heavy_attributes, referred_to
from convsim_init.layers.memory import gradient_hooks, is_readable, is_wrapper, write_values

FEW = 10**4  # objects that hooks refer to, of which in each pass no more are searched; entries of what they note
NEAR = 2  # levels in which what hooks note is searched: further away, other threads may be writing

_weights_lock = threading.RLock()
_passes: list[tuple[int, frozenset[int]]] = []  # that run now: the thread, and the ids of the modules
_passes_changed = threading.Condition()  # guards the list, and is notified when a pass leaves it
_eager_stance: list[ExitStack] = []  # at most one, which ends the stance that the first of the passes has set


@contextmanager
def holding_weights_lock() -> Iterator[None]:
    """Context, and decorator, in which no other thread reads, tries or writes weights of live modules."""
    with _weights_lock:
        yield


@contextmanager
def isolated(module: nn.Module) -> Iterator[None]:
    """Context in which a module can run in evaluation mode, and which undoes all changes at the end.

    Meanwhile attributes hold copies of their values, except for `heavy_attributes`. One thread at a time can be in it.
    """
    parts = list(tree.modules(module))
    with holding_weights_lock(), not_cached(), undisturbed(module, notes=True) as kept, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the module's code may warn of the unusual input
        # Modules and tensors that are restored are not copied: hooks refer to them, and trials write to them.
        memo: dict[int, Any] = {id(value): value for value in kept}
        for part in parts:
            heavy = heavy_attributes(part, parts)
            used = {name: copied(value, memo) for name, value in vars(part).items() if name not in heavy}
            # `eval` is not called, because a class may override it.
            vars(part).update(used | {"training": False})
        after_forward = {"_forward_hooks", "_backward_hooks", "_backward_pre_hooks"}  # run after all convolutions
        for name in vars(module).keys() & after_forward:
            vars(module)[name] = type(vars(module)[name])()
        yield


@contextmanager
def undisturbed(
    module: nn.Module, *, copy: Callable[[Tensor], bool] = lambda _: True, notes: bool = False
) -> Iterator[list[nn.Module | Tensor]]:
    """Context in which a module may run in its present mode, and which undoes changes at the end.

    The module itself runs and no copy, because hooks and closures may refer to its tensors and their memory. Values,
    attributes, the content of lists and dicts in them, gradients and hooks are saved first and restored in place, those
    of other modules and tensors too that hooks and patched forward passes may change. Changes deep within objects that
    attributes hold are not undone. Threads that want to run the same modules wait for each other. It is given the
    modules and tensors that are restored. `copy` tells whether the values of a tensor are saved too; `notes`, whether
    lists and dicts that hooks refer to are restored.
    """
    parts = list(tree.modules(module))
    known, noting = known_to_functions(parts)
    parts = _with_modules_in(parts, known)
    further = _with_modules_in(parts, noting)
    with running(further):
        attributes = [vars(part) for part in further]
        values = [value for names in attributes for key, value in names.items() if "hooks" not in key]
        held = [*values, *known, *noting] if notes else values
        saved = [*attributes, *(value for value in held if type(value) in (dict, OrderedDict, list))]
        kept = ((key, value) for part in parts for key, value in vars(part).items())  # a module has many hooks
        saved += [value for key, value in kept if "hooks" in key and isinstance(value, (dict, list))]
        undo: list[Callable[[], object]]
        undo = [partial(restore_content, live, list(live) if isinstance(live, list) else dict(live)) for live in saved]
        others = (value for value in values if type(value) not in (*ATOMS, *CONTAINERS))  # `isinstance` is slow
        undo += [partial(value.set_state, value.get_state()) for value in others if isinstance(value, torch.Generator)]
        changing = [*(tensor for part in parts for tensor in tensors_of(part)), *filter(torch.is_tensor, known)]
        # Functions that name nothing which changes weights may note something elsewhere, but in no parameter.
        noted = [*(tensor for part in further for tensor in tensors_of(part)), *filter(torch.is_tensor, noting)]
        changing += filter(_is_small, noted)
        tensors = list({id(tensor): tensor for tensor in changing}.values())
        undo += [backup_tensor(tensor, copy=copy(tensor)) for tensor in tensors]
        with random_states(tensors):
            try:
                yield [*further, *tensors]
            finally:
                for restore in undo:
                    restore()


def known_to_functions(parts: Sequence[nn.Module]) -> tuple[list[object], list[object]]:
    """What hooks and patched forward passes refer to: those that may change weights, and near them the others."""
    functions = [hook for part in parts for name in HOOKS for hook in vars(part).get(name, {}).values()]
    functions += nn.modules.module._global_forward_pre_hooks.values()
    functions += nn.modules.module._global_forward_hooks.values()
    functions += [vars(part)["forward"] for part in parts if "forward" in vars(part)]
    changing, others = list[object](), list[object]()
    for function in functions:
        (changing if may_change(function) else others).append(function)
    return _reached_from(changing), _reached_from(others, NEAR)


def _reached_from(functions: Iterable[object], levels: float = math.inf) -> list[object]:
    """The functions and, up to that many levels further, the objects that they refer to, each once."""
    found, pending = dict[int, object](), [(function, 0) for function in functions]
    for value, depth in pending:  # grows in the loop
        with suppress(Exception):  # of any kind, from code of the object's own class
            size = len(value) if isinstance(value, CONTAINERS) else 0
            if id(value) not in found and not isinstance(value, (*ATOMS, type)) and len(pending) + size < FEW:
                found[id(value)] = value
                pending += zip(referred_to(value) if depth < levels else (), repeat(depth + 1))
    return list(found.values())


def _with_modules_in(parts: Sequence[nn.Module], values: Sequence[object]) -> list[nn.Module]:
    """The parts and, once each, all modules among the values with those inside them."""
    modules = (value for value in values if isinstance(value, nn.Module) and hasattr(value, "_modules"))
    around = (part for value in modules for part in tree.modules(value))
    return list({id(part): part for part in (*parts, *around)}.values())


def _is_small(tensor: Tensor) -> bool:
    """Whether it is an ordinary tensor of few entries and no parameter, as counters and observers are."""
    return is_readable(tensor) and tensor.numel() < FEW and not isinstance(tensor, nn.Parameter)


@contextmanager
def running(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Context for passes of our own: it waits until no other thread is in such a context with one of these modules.

    Compiled modules run eagerly, because our function modes need values. PyTorch has a single stance for all threads:
    the first thread that enters sets it, and the last one that leaves resets it.
    """
    own = threading.get_ident(), frozenset(map(id, parts))
    with _passes_changed:
        # Entries of this thread are skipped: it would wait for itself for ever.
        _passes_changed.wait_for(lambda: all(thread == own[0] or ids.isdisjoint(own[1]) for thread, ids in _passes))
        # Setting the stance imports Dynamo, which takes seconds. Until Dynamo is imported nothing is compiled.
        has_stances = "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance")  # since PyTorch 2.6
        if has_stances and not _eager_stance:
            _eager_stance.append(ExitStack())
            _eager_stance[0].enter_context(torch.compiler.set_stance("force_eager"))
        _passes.append(own)
    try:
        yield
    finally:
        with _passes_changed:
            _passes.remove(own)
            _passes_changed.notify_all()
            if _eager_stance and not _passes:
                _eager_stance.pop().close()


def is_running(*, in_any_thread: bool = False) -> bool:
    """Whether this thread, or any, runs passes of our own: what code builds or copies in those is not the user's."""
    with _passes_changed:  # a pass that ends in another thread meanwhile would make the loop skip an entry
        return any(in_any_thread or thread == threading.get_ident() for thread, _ in _passes)


def restore_content(live: Any, before: Any) -> None:
    """Restore the content of a list or a dict; an unchanged one is not written, because others may be reading it."""
    # Compared by identity: `==` of tensors gives a tensor, whose truth is an error unless it has one entry.
    same_items = len(live) == len(before) and all(map(operator.is_, live, before))  # of a dict the keys
    if isinstance(live, list):
        if not same_items:
            live[:] = before
    elif not (same_items and all(map(operator.is_, live.values(), before.values()))):
        # A plain dict with the same keys is never empty meanwhile. The update of a Counter would add to its counts.
        if type(live) is not dict or not same_items:
            live.clear()
        live.update(before)


def backup_tensor(tensor: Tensor, *, copy: bool = True) -> Callable[[], None]:
    """A function that restores a tensor's memory, values (if copied), gradient and flag, and writes only changes."""
    # PyTorch warns when a tensor that is no leaf is asked for its gradient.
    data, grad, required = tensor.data, tensor.grad if tensor.is_leaf else None, tensor.requires_grad
    wrapper = is_wrapper(data)
    strided = data.layout is torch.strided and not wrapper  # the memory of others cannot be compared
    values = data.clone() if copy and not (data.is_meta or wrapper) else None
    hooks = list(map(dict, gradient_hooks(tensor)))

    def restore() -> None:
        if not strided:
            tensor.data = data if values is None else values
        else:
            if _place(tensor.data) != _place(data):
                tensor.data = data
            unchanged = False
            with suppress(NotImplementedError):  # torch does not compare packed dtypes, such as float4
                unchanged = values is None or torch.equal(data, values)
            if values is not None and not unchanged:
                write_values(data, values)
        if tensor.is_leaf:
            if tensor.requires_grad != required:
                tensor.requires_grad_(required)
            if tensor.grad is not grad:
                tensor.grad = grad
            for live, before in zip(gradient_hooks(tensor), hooks, strict=True):
                restore_content(live, before)

    return restore


def _place(data: Tensor) -> tuple[object, ...]:
    return data.data_ptr(), data.dtype, data.shape, data.stride()


def tensors_of(part: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and tensors in plain attributes of a module, without those of its children."""
    for value in (*part._parameters.values(), *part._buffers.values(), *vars(part).values()):
        if isinstance(value, Tensor):
            yield value


@contextmanager
def random_states(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Context that restores the random states of torch, Python and NumPy, of the devices of these tensors too."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    # By default fork_rng saves the states of all GPUs, and warns if there are several.
    gpus = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    with torch.random.fork_rng(gpus):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def draw_numbers(device: torch.device) -> None:
    """Advance the random states, so that what is drawn next differs."""
    random.random(), np.random.random(), torch.rand(1, device=device)


@contextmanager
def not_cached() -> Iterator[None]:
    """Context without the cache of `parametrize.cached`, which may hold what was computed from earlier weights."""
    enabled, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        yield
    finally:
        parametrize._cache_enabled = enabled
