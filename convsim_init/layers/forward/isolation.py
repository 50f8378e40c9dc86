"""A live module runs, and whatever that changes is put back: what trial passes and measures on data are made in.

Parameters, buffers, attributes, modes and random states are those of before, to the bit, whether they were changed in
place or by assignment.
"""

from __future__ import annotations

import operator
import random
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from convsim_init.layers import tree
from convsim_init.layers.forward.copies import ATOMS, CONTAINERS, copied, heavy_attributes
from convsim_init.layers.memory import gradient_hooks, is_wrapper

_weights_lock = threading.RLock()
_running_passes: list[tuple[int, frozenset[int]]] = []  # of each: its thread, and the ids of the modules that it runs
_passes_changed = threading.Condition()  # guards the list, and is notified when a pass leaves it
_eager_stance: list[ExitStack] = []  # at most one, which ends the stance that the first of the passes has set


@contextmanager
def holding_weights_lock() -> Iterator[None]:
    """Context, and decorator, in which no other thread reads, tries or writes weights of live modules."""
    with _weights_lock:
        yield


@contextmanager
def isolated(module: nn.Module) -> Iterator[None]:
    """Context in which a module can run in evaluation mode and nothing of what that changes remains.

    What attributes hold is a copy meanwhile, but for `heavy_attributes`. One thread at a time.
    """
    parts = list(tree.modules(module))
    # Lists and dicts need not be put back: what attributes hold in here are copies of them.
    with holding_weights_lock(), not_cached(), undisturbed(module, containers=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its code says of an input that is not what it is made for
        # Modules and tensors stay themselves: hooks know them, and trials write to them.
        memo: dict[int, Any] = {id(one): one for one in (*parts, *(one for part in parts for one in tensors_of(part)))}
        for part in parts:
            heavy = heavy_attributes(part, parts)
            used = {name: copied(value, memo) for name, value in vars(part).items() if name not in heavy}
            # Not by `eval`, which a class may have overridden.
            vars(part).update(used | {"training": False})
        later = {"_forward_hooks", "_backward_hooks", "_backward_pre_hooks"}  # called after all convolutions
        for name in vars(module).keys() & later:
            vars(module)[name] = type(vars(module)[name])()
        yield


@contextmanager
def undisturbed(
    module: nn.Module, *, copy: Callable[[Tensor], bool] = lambda _: True, containers: bool = True
) -> Iterator[None]:
    """Context in which a module may run in whatever mode it is, and nothing of what that changes remains.

    It runs where it is, because hooks and closures may know its tensors and their memory: values, attributes, gradients
    and hooks are noted before, and put back in place at the end. What is changed deep within objects that attributes
    hold stays. Threads that run one model like that wait for each other.

    Args:
        module: The module.
        copy: Of which tensors the values are kept too. Default: of all.
        containers: Whether what lists and dicts hold that are attributes is put back too, as that of hooks is.
    """
    parts = list(tree.modules(module))
    with running(parts):
        attributes = [vars(part) for part in parts]
        values = [value for one in attributes for value in one.values()]
        held: list[Any] = [*attributes]
        held += [d for one in attributes for name, d in one.items() if "hooks" in name and isinstance(d, dict)]
        held += [one for one in values if containers and type(one) in (dict, OrderedDict, list)]
        undo: list[Callable[[], object]]
        undo = [partial(put_content_back, one, list(one) if isinstance(one, list) else dict(one)) for one in held]
        others = (one for one in values if type(one) not in (*ATOMS, *CONTAINERS))  # to ask these takes its time
        undo += [partial(one.set_state, one.get_state()) for one in others if isinstance(one, torch.Generator)]
        tensors = list({id(one): one for part in parts for one in tensors_of(part)}.values())
        undo += [noted(one, copy=copy(one)) for one in tensors]
        with random_states(tensors):
            try:
                yield
            finally:
                for put_back in undo:
                    put_back()


@contextmanager
def running(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Context for passes of our own, in which these modules run in no other thread that is in such a context.

    What is compiled runs as it is, for what looks on asks for values. PyTorch has one such setting for all threads, and
    each would put back what it found: the last one out does.
    """
    own = threading.get_ident(), frozenset(map(id, parts))
    with _passes_changed:
        # A thread that is in such a context already would wait for itself, for ever.
        _passes_changed.wait_for(
            lambda: all(thread == own[0] or ids.isdisjoint(own[1]) for thread, ids in _running_passes)
        )
        # Setting it imports that, which takes seconds; before it is imported nothing is compiled.
        has_stances = "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance")  # since PyTorch 2.6
        if has_stances and not _eager_stance:
            _eager_stance.append(ExitStack())
            _eager_stance[0].enter_context(torch.compiler.set_stance("force_eager"))
        _running_passes.append(own)
    try:
        yield
    finally:
        with _passes_changed:
            _running_passes.remove(own)
            _passes_changed.notify_all()
            if _eager_stance and not _running_passes:
                _eager_stance.pop().close()


def is_running(*, in_any_thread: bool = False) -> bool:
    """Whether this thread, or any, runs passes of our own: what code builds or copies in those is not the user's."""
    with _passes_changed:  # a pass that ends in another thread meanwhile would make the loop skip an entry
        return any(in_any_thread or thread == threading.get_ident() for thread, _ in _running_passes)


def put_content_back(live: Any, before: Any) -> None:
    """Give a list or a dict its content back; what did not change others may be reading."""
    # By identity, as `==` of tensors is a tensor, which has no truth unless it is of one entry.
    alike = len(live) == len(before) and all(map(operator.is_, live, before))  # but for the values of a dict
    if isinstance(live, list):
        if not alike:
            live[:] = before
    elif not (alike and all(map(operator.is_, live.values(), before.values()))):
        if type(live) is not dict or not alike:  # else all of it is there meanwhile too; a Counter would count
            live.clear()
        live.update(before)


def noted(tensor: Tensor, *, copy: bool = True) -> Callable[[], None]:
    """What gives a tensor its memory, values (if copied), gradient and flag back; it writes what changed alone."""
    # PyTorch warns where a tensor that is no leaf is asked for its gradient.
    data, grad, required = tensor.data, tensor.grad if tensor.is_leaf else None, tensor.requires_grad
    wrapper = is_wrapper(data)
    strided = data.layout is torch.strided and not wrapper  # others have no memory that could be compared
    values = data.clone() if copy and not (data.is_meta or wrapper) else None
    hooks = list(map(dict, gradient_hooks(tensor)))

    def put_back() -> None:
        if not strided:
            tensor.data = data if values is None else values
        else:
            if _place(tensor.data) != _place(data):
                tensor.data = data
            if values is not None and not torch.equal(data, values):
                data.copy_(values)
        if tensor.is_leaf:
            if tensor.requires_grad != required:
                tensor.requires_grad_(required)
            if tensor.grad is not grad:
                tensor.grad = grad
            for live, before in zip(gradient_hooks(tensor), hooks, strict=True):
                put_content_back(live, before)

    return put_back


def _place(data: Tensor) -> tuple[object, ...]:
    return data.data_ptr(), data.dtype, data.shape, data.stride()


def tensors_of(part: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and tensors that are plain attributes of a module itself."""
    for value in (*part._parameters.values(), *part._buffers.values(), *vars(part).values()):
        if isinstance(value, Tensor):
            yield value


@contextmanager
def random_states(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Context that leaves the random states of torch, Python and NumPy as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    # By default fork_rng takes the states of all cards, and warns where there are several.
    cards = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    with torch.random.fork_rng(cards):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def draw_numbers(device: torch.device) -> None:
    """Move the random states on."""
    random.random(), np.random.random(), torch.rand(1, device=device)


@contextmanager
def not_cached() -> Iterator[None]:
    """Context in which what `parametrize.cached` keeps, of the weights of before perhaps, counts for nothing."""
    enabled, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        yield
    finally:
        parametrize._cache_enabled = enabled
