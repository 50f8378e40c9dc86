"""A live module runs, and whatever that changes is put back: what trial passes and measures on data are made in.

Parameters, buffers, attributes, modes and random states are those of before, to the bit, whether they were changed in
place or by assignment.
"""

from __future__ import annotations

import copy
import operator
import random
import sys
import threading
import warnings
from collections import ChainMap, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import wraps
from itertools import chain
from types import FunctionType, MethodType, ModuleType
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from convsim_init.layers import tree
from convsim_init.layers.code.held import is_plain
from convsim_init.layers.code.reading import names_of
from convsim_init.layers.memory import gradient_hooks, is_wrapper

LIVE = threading.RLock()  # of all that reads, tries or writes the weights of live modules
TRIALS: list[nn.Module] = []  # whose trial passes run, in whatever threads
EAGER: list[int] = []  # the threads in which nothing is compiled
COUNTING, FOUND = threading.Lock(), ExitStack()  # of them, and what puts back what the first of them found
LATER_HOOKS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")  # a trial ends before they are due
ORIGINAL = "_copied_from"  # an attribute of a parameter's copy: the id of what it is a copy of
ATOMS = (bool, int, float, str, type(None))
CONTAINERS = (tuple, list, set, dict, OrderedDict)
USUAL = {*ATOMS, *CONTAINERS}  # types of attributes
P = ParamSpec("P")
R = TypeVar("R")
HEAVY, MANY = 2**27, 10**5  # bytes of tensors, and objects, that are not copied for a trial


def one_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """A function that waits for other threads that read, try or write the weights of live modules."""

    @wraps(function)
    def waiting(*args: P.args, **kwargs: P.kwargs) -> R:
        with LIVE:
            return function(*args, **kwargs)

    return waiting


@contextmanager
def isolated(module: nn.Module) -> Iterator[None]:
    """Context in which a module can run in evaluation mode and nothing of what that changes remains.

    What attributes hold is a copy meanwhile, but for `heavy_attributes`. One thread at a time.
    """
    parts = list(tree.modules(module))
    with LIVE, undisturbed(module, containers=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its code says of an input that is not what it is made for
        memo: dict[int, Any] = {id(one): one for one in (*parts, *(one for part in parts for one in tensors_of(part)))}
        for part in parts:
            heavy = heavy_attributes(part, parts)
            used = {name: copied(value, memo) for name, value in vars(part).items() if name not in heavy}
            vars(part).update(used | {"training": False})
        vars(module).update({name: type(vars(module)[name])() for name in LATER_HOOKS if name in vars(module)})
        yield


@contextmanager
def undisturbed(
    module: nn.Module, *, copy: Callable[[Tensor], bool] = lambda _: True, containers: bool = True
) -> Iterator[None]:
    """Context in which a module may run in whatever mode it is, and nothing of what that changes remains.

    It runs where it is, because hooks and closures may know its tensors and their memory: values, attributes, gradients
    and hooks are noted before, and put back in place at the end. What is changed deep within objects that attributes
    hold stays. One model is not to be run by several threads at a time.

    Args:
        module: The module.
        copy: Of which tensors the values are kept too. Default: of all.
        containers: Whether what lists and dicts hold that are attributes is put back too, as that of hooks is.
    """
    parts = list(tree.modules(module))
    attributes = [vars(part) for part in parts]
    values = [value for one in attributes for value in one.values()]
    held: list[Any] = [*attributes]
    held += [d for one in attributes for name, d in one.items() if "hooks" in name and isinstance(d, dict)]
    held += [one for one in values if containers and type(one) in (dict, OrderedDict, list)]
    contents = list(map(_content, held))
    others = (one for one in values if type(one) not in USUAL)  # to ask for a generator takes its time
    generators = [(one, one.get_state()) for one in others if isinstance(one, torch.Generator)]
    tensors = list({id(one): one for part in parts for one in tensors_of(part)}.values())
    undo = [noted(one, copy=copy(one)) for one in tensors]
    with random_states(tensors), not_compiled():
        TRIALS.append(module)
        try:
            yield
        finally:
            TRIALS.pop()  # whichever: while any runs, no pass counts
            for live, before in zip(held, contents, strict=True):
                now = _content(live)  # what did not change others may be reading
                if len(now) != len(before) or any(map(operator.is_not, now, before)):
                    live.clear()
                    if isinstance(live, list):
                        live.extend(before)
                    else:
                        live.update(dict(zip(before[::2], before[1::2], strict=True)))  # a Counter would count pairs
            for generator, state in generators:
                generator.set_state(state)
            for put_back in undo:
                put_back()


def _content(container: dict[Any, Any] | list[Any]) -> list[Any]:
    """What a list holds; the keys and values of a dict in turn."""
    return list(container if isinstance(container, list) else chain.from_iterable(container.items()))


def noted(tensor: Tensor, *, copy: bool = True) -> Callable[[], None]:
    """What gives a tensor its memory, values, gradient and flag back; nothing is written where nothing changed.

    Args:
        tensor: The tensor.
        copy: Whether its values are kept too, and not only where they are.
    """
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
                for hook in live.keys() - before.keys():
                    del live[hook]

    return put_back


def _place(data: Tensor) -> tuple[object, ...]:
    return data.data_ptr(), data.dtype, data.shape, data.stride()


def tensors_of(part: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and tensors that are plain attributes of a module itself."""
    for value in (*part._parameters.values(), *part._buffers.values(), *vars(part).values()):
        if isinstance(value, Tensor):
            yield value


def heavy_attributes(part: nn.Module, parts: Sequence[nn.Module]) -> set[str]:
    """Attributes of a module that no forward pass names and a copy of which might fill the memory.

    Such as a trainer, or a data set.

    Args:
        part: Module.
        parts: All modules whose forward passes might use the attributes.
    """
    found = {name for name, value in vars(part).items() if _is_heavy(value)}
    return found - names_of(parts) if found else found


def _is_heavy(value: object) -> bool:
    """Whether an object leads to many others or to large tensors and arrays."""
    if isinstance(value, (Tensor, dict, list, tuple, set)) or not hasattr(value, "__dict__"):
        return False
    size, known, pending = 0, set[int](), list[object]([value])
    for one in pending:
        if id(one) in known or isinstance(one, (nn.Module, type, FunctionType, MethodType, ModuleType)):
            continue
        known.add(id(one))
        if isinstance(one, (Tensor, np.ndarray)):
            size += one.nbytes if isinstance(one, np.ndarray) or one.layout is torch.strided else 0
        elif isinstance(one, Mapping):
            pending += one.values() if isinstance(one, dict) else ()
        elif isinstance(one, (list, tuple, set, deque)):
            pending += one
        else:
            pending += getattr(one, "__dict__", {}).values()
        if size > HEAVY or len(pending) > MANY:
            return True
    return False


def copied(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of an attribute, but for the modules and tensors in the memo and for what cannot be copied."""
    if isinstance(value, ATOMS):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if type(value) in CONTAINERS and all(type(one) in ATOMS or memo.get(id(one)) is one for one in _inside(value)):
        return value if isinstance(value, tuple) else type(value)(value)  # as most are; deepcopy takes its time
    if isinstance(value, torch.Generator):
        return value.clone_state()
    new: dict[int, Any] = {}
    try:
        with _ComputedToo():
            twin = copy.deepcopy(value, ChainMap(new, memo))  # type: ignore[arg-type]
    except Exception:  # of any kind: a lock, an open file
        return _copied_in_part(value, memo)
    for original, one in new.items():
        if isinstance(one, nn.Parameter) and original != id(one):
            vars(one)[ORIGINAL] = original
    return twin


def _inside(container: Iterable[Any]) -> Iterable[Any]:
    return chain(container, container.values()) if isinstance(container, dict) else container


def _copied_in_part(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of an object of somebody's own, or of a container, by its parts; anything else itself.

    What other threads may wait for, such as a queue, has to stay the same.
    """
    if type(value) in (list, tuple):
        return type(value)(copied(one, memo) for one in value)
    twin: Any = value
    if isinstance(value, dict) or (is_plain(value) and not hasattr(value, "__del__")):
        with suppress(Exception):  # of any kind
            twin = memo[id(value)] = copy.copy(value)
    if twin is not value:
        parts = twin if isinstance(value, dict) else vars(twin)
        parts.update({name: copied(one, memo) for name, one in parts.items()})
    return twin


class _ComputedToo(TorchFunctionMode):
    """Context in which tensors that were computed are copied too; they depend on what they did."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            with torch.enable_grad():
                return args[0].clone()
        return func(*args, **(kwargs or {}))


@contextmanager
def random_states(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Context that leaves the random states of torch, Python and NumPy as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
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


def compiled_parts(parts: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The modules among some that torch.compile has compiled, in place or within a wrapper."""
    for part in parts:
        if part._compiled_call_impl is not None:
            yield part
        elif "_orig_mod" in part._modules:
            yield part.get_submodule("_orig_mod")


@contextmanager
def not_compiled() -> Iterator[None]:
    """Context in which what is compiled runs as it is, for what looks on asks for values.

    PyTorch has one such setting for all threads, and each would put back what it found: the last one out does.
    """
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):  # since PyTorch 2.6
        yield
        return
    with COUNTING:
        if not EAGER:
            FOUND.enter_context(torch.compiler.set_stance("force_eager"))
        EAGER.append(threading.get_ident())
    try:
        yield
    finally:
        with COUNTING:
            EAGER.remove(threading.get_ident())
            if not EAGER:
                FOUND.close()
