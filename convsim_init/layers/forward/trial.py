"""A trial pass: a module's forward pass is begun, and the weight is taken that it gives to a convolution.

Whatever the pass changes, in place or by assignment, is put back: parameters, buffers, attributes,
modes and random states are those of before, to the bit.
"""

from __future__ import annotations

import contextlib
import copy
import random
import threading
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from convsim_init.layers.forward.code import CONVOLUTIONS, TRANSPOSED, names_of

LIVE = threading.RLock()  # of all that reads, tries or writes the weights of live modules
TRIALS: list[nn.Module] = []  # whose trial passes run, in whatever threads
LATER_HOOKS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")  # a trial ends before they are due
HEAVY, MANY = 2**27, 10**5  # bytes of tensors, and objects, that are not copied for a trial


class NoConvolutionError(RuntimeError):
    """The forward pass called no convolution with a weight of the module's shape."""


class Call(NamedTuple):
    """What a forward pass gives to a convolution.

    Attributes:
        weight: The weight at that moment; it shares no memory with the module.
        groups: Groups of the convolution.
        transposed: Whether it is a transposed convolution.
    """

    weight: Tensor
    groups: int
    transposed: bool


def convolution_calls(module: nn.Module, x: Tensor, others: Collection[int] = ()) -> tuple[list[Call], bool]:
    """All that a module's forward pass gives to convolutions, from an input.

    The weights are differentiable by the parameters that they are made of, frozen ones too.

    Args:
        module: Module that calls convolutions.
        x: Input of the pass.
        others: Addresses of weights that do not count.

    Returns:
        The calls, and whether the pass came to its end: an error after a call is none here.

    Raises:
        Exception: Whatever the module's own code raises before the first call.
    """
    capture = _Capture(None, others)
    with isolated(module), capture, torch.enable_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point() and not parameter.is_inference():
                parameter.requires_grad_()
        try:
            module(x)
        except Exception:
            if not capture.calls:
                raise
            return capture.calls, False
    return capture.calls, True


def weight_given_to_convolution(
    module: nn.Module,
    stored: Tensor,
    x: Tensor,
    others: Collection[int] = (),
    *,
    index: int = 0,
    probe: Tensor | None = None,
    redraw: bool = False,
) -> Tensor:
    """The weight that a module's forward pass, in evaluation mode, gives to a convolution.

    Args:
        module: Module that calls a convolution.
        stored: Weight that it holds; the one that is given has that shape.
        x: Input of the pass.
        others: Addresses of weights that do not count.
        index: Position among the calls with a weight of that shape.
        probe: Values to be tried in the parameter's place.
        redraw: Whether random numbers are others than without it.

    Returns:
        The weight at that moment, differentiable by the module's parameters; it shares no memory with
        them.

    Raises:
        NoConvolutionError: If there is none.
        Exception: Whatever the module's own code raises.
    """
    capture = _Capture(stored.shape, others, last=index)
    with isolated(module), capture, contextlib.suppress(_CapturedError):
        if probe is not None:
            stored.data.copy_(probe)
        if redraw:
            draw_numbers(stored.device)
        module(x)
    if len(capture.calls) <= index:  # also where the module's code swallowed what ends the pass
        raise NoConvolutionError("its forward pass called no convolution with a weight of that shape")
    return capture.calls[index].weight


def draw_numbers(device: torch.device) -> None:
    """Move the random states on."""
    random.random(), np.random.random(), torch.rand(1, device=device)


@contextmanager
def isolated(module: nn.Module) -> Iterator[None]:
    """Context in which a module can run in evaluation mode and nothing of what that changes remains.

    It runs where it is, because hooks and closures may know its tensors and their memory: values,
    attributes, gradients and hooks are noted before, and put back in place at the end. What attributes
    hold is a copy meanwhile, but for `heavy_attributes`. One thread at a time.
    """
    parts = list(module.modules())
    tensors = list({id(tensor): tensor for part in parts for tensor in tensors_of(part)}.values())
    with LIVE, random_states(tensors), not_compiled(parts), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its code says of an input that is not what it is made for
        attributes = [dict(vars(part)) for part in parts]
        registries = [d for part in parts for name, d in vars(part).items() if "hooks" in name and isinstance(d, dict)]
        hooks = [(one, one.copy()) for one in registries]
        undo = [noted(tensor) for tensor in tensors]
        TRIALS.append(module)
        try:
            memo: dict[int, Any] = {id(one): one for one in (*parts, *tensors)}
            for part in parts:
                heavy = heavy_attributes(part, parts)
                used = {name: copied(value, memo) for name, value in vars(part).items() if name not in heavy}
                vars(part).update(used | {"training": False})
            vars(module).update({name: type(vars(module)[name])() for name in LATER_HOOKS if name in vars(module)})
            yield
        finally:
            TRIALS.pop()
            for part, before in zip(parts, attributes, strict=True):
                vars(part).clear()
                vars(part).update(before)
            for registry, before in hooks:  # a hook may remove itself from the live one
                if list(registry.items()) != list(before.items()):
                    registry.clear()
                    registry.update(before)
            for put_back in undo:
                put_back()


def compiled_parts(parts: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The modules among some that torch.compile has compiled, in place or within a wrapper."""
    for part in parts:
        if part._compiled_call_impl is not None:
            yield part
        elif "_orig_mod" in part._modules:
            yield part.get_submodule("_orig_mod")


@contextmanager
def not_compiled(parts: Iterable[nn.Module]) -> Iterator[None]:
    """Context in which compiled modules run as they are, for what looks on asks for values."""
    if next(compiled_parts(parts), None) is None or not hasattr(torch.compiler, "set_stance"):  # since PyTorch 2.6
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def noted(tensor: Tensor, *, copy: bool = True) -> Callable[[], None]:
    """What gives a tensor its memory, values, gradient and flag back; nothing is written where nothing changed.

    Args:
        tensor: The tensor.
        copy: Whether its values are kept too, and not only where they are.
    """
    data, grad, required = tensor.data, tensor.grad if tensor.is_leaf else None, tensor.requires_grad
    values = data.clone() if copy and not data.is_meta else None
    hooks = dict(tensor._backward_hooks or {})

    def put_back() -> None:
        moved = tensor.data.data_ptr() != data.data_ptr() or tensor.dtype != data.dtype
        if moved or tensor.shape != data.shape or tensor.stride() != data.stride():
            tensor.data = data
        if values is not None and not torch.equal(data, values):
            data.copy_(values)
        if tensor.is_leaf:
            if tensor.requires_grad != required:
                tensor.requires_grad_(required)
            if tensor.grad is not grad:
                tensor.grad = grad
            live = tensor._backward_hooks or {}
            for hook in live.keys() - hooks.keys():
                del live[hook]

    return put_back


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
    """A copy of an attribute, but for the modules and tensors in the memo; itself where it cannot be copied."""
    if isinstance(value, torch.Generator):
        return value.clone_state()
    try:
        return copy.deepcopy(value, dict(memo))
    except Exception:  # of any kind: a lock, an open file, a tensor that was computed
        if isinstance(value, dict):
            twin = copy.copy(value)
            twin.update({key: copied(one, memo) for key, one in value.items()})
            return twin
        return [copied(one, memo) for one in value] if type(value) is list else value


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


class _CapturedError(BaseException):
    """Ends a forward pass where it gives a weight to a convolution; no handler of exceptions stops it."""


class _Capture(TorchFunctionMode):
    """Context that keeps what is given to convolutions with a weight of some shape.

    Args:
        shape: Shape of the weight; None for any.
        others: Addresses of weights that do not count.
        last: Position of the call that ends the forward pass. Default: None; it goes on.
    """

    def __init__(self, shape: Sequence[int] | None, others: Collection[int], last: int | None = None) -> None:
        super().__init__()
        self._shape, self._others, self._last = shape, others, last
        self.calls: list[Call] = []

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func in CONVOLUTIONS and (self._last is None or len(self.calls) <= self._last):
            weight, _, transposed, groups = convolution_arguments(func, args, kwargs)
            if self._shape in (None, weight.shape) and weight.data_ptr() not in self._others:
                self.calls.append(Call(weight.clone(), groups, transposed))  # before its memory is put back
                if len(self.calls) - 1 == self._last:
                    raise _CapturedError
        return func(*args, **kwargs)


def convolution_arguments(
    func: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None, bool, int]:
    """The weight of a convolution, its bias, whether it is transposed, and its groups."""

    def argument(name: str, position: int, default: Any = None) -> Any:
        return args[position] if len(args) > position else kwargs.get(name, default)

    weight, bias = argument("weight", 1), argument("bias", 2)
    if func is torch.convolution:
        return weight, bias, argument("transposed", 6), argument("groups", 8)
    return weight, bias, func in TRANSPOSED, argument("groups", 6, 1)
