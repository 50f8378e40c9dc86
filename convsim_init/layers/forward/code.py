"""What the code of a forward pass says of the weights that it uses: from the names in it, nothing is run."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property, lru_cache, partial, partialmethod
from types import CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.conv import _ConvNd

from convsim_init.layers.forward.bytecode import (
    LOOP,
    asked_of_bases,
    changed_in_place,
    names_convolution,
    texts,
    weights_read,
)

TRANSPOSED = {F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d, torch.convolution, *TRANSPOSED}
EMPTY: Mapping[str, Any] = MappingProxyType({})
PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
METHODS = ("__call__", "forward", "_conv_forward")
CALLS = {"_conv_forward", *(call.__name__ for call in CONVOLUTIONS)}
FEW = 16  # functions in a list or dict that are looked at
MAX_CODE = 1000  # functions that a forward pass is followed into
HANDED_OUT = {"weight", "parameters", "named_parameters", "state_dict"}  # what may take a weight out of a convolution
WALKS = {"modules", "named_modules", "children", "named_children", "apply"}


def has_forward_of_its_own(module: _ConvNd) -> bool:
    """Whether its class, or the module itself, may use another weight than PyTorch's convolutions do."""
    base = next((kind for kind in PLAIN if isinstance(module, kind)), None)
    return base is None or any(
        name in vars(module) or getattr(type(module), name, None) is not getattr(base, name, None) for name in METHODS
    )


def forward_code(module: nn.Module) -> ForwardCode:
    """The code of a module's forward pass."""
    kind: Any = type(module)
    own = vars(module).get("forward")
    forward = getattr(kind, "forward", None) if own is None else own
    held = {
        name: one
        for name, one in vars(module).items()
        if isinstance(one, ModuleType) or _takes_weights(one) or _convolves(one)
    }
    helpers = frozenset(_classes_inside(module))
    if own is not None or held or type(forward).__hash__ is None:  # not kept in the cache: they may hold the module
        return ForwardCode(kind, forward, helpers, held)
    return _code_of(kind, forward, helpers)


class ForwardCode:
    """The code of a forward pass, of the functions in it, and of the methods and functions that it names.

    Args:
        kind: Class of the module.
        forward: Its forward pass.
        helpers: Classes of convolutions inside it, whose own methods it may call.
        held: Functions that its attributes hold and that take weights or convolve, by their names.
    """

    def __init__(
        self, kind: Any, forward: Any, helpers: Iterable[type] = (), held: Mapping[str, Callable[..., Any]] = EMPTY
    ) -> None:
        self._functions: list[list[CodeType]] = []  # each with the ones inside it
        self._codes: list[CodeType] = []
        self._convolving = False
        pending = _functions(forward)
        for function in pending:
            if function.__code__ in self._codes or len(self._codes) > MAX_CODE:
                continue
            inner, selves = [function.__code__], {"self", *function.__code__.co_varnames[:1]}
            for one in inner:
                inner += [constant for constant in one.co_consts if isinstance(constant, CodeType)]
                known = [function.__globals__.get(name) for name in one.co_names]
                own = [getattr(kind, name, None) for name in one.co_names] + list(map(held.get, one.co_names))
                libraries = any(isinstance(each, ModuleType) for each in own) and not CALLS.isdisjoint(one.co_names)
                self._convolving |= (
                    any(map(_convolves, known + own)) or libraries or names_convolution(one, selves, CALLS)
                )
                spaces = [one for one in known if isinstance(one, ModuleType) or _is_plain_class(one)]
                known += own
                for name in one.co_names:
                    known += [vars(space).get(name) for space in spaces]
                    if not hasattr(nn.Module, name):
                        known += [getattr(helper, name, None) for helper in helpers]
                for name in asked_of_bases(one, kind.__mro__):
                    known += [vars(base).get(name) for base in kind.__mro__]
                pending += [each for value in known for each in _functions(value) if not _is_librarys(each)]
            self._codes += inner
            self._functions.append(inner)

    @cached_property
    def names(self) -> set[str]:
        """The names of attributes and functions in it, and strings that may be names."""
        return set().union(*map(texts, self._codes))

    @property
    def convolves(self) -> bool:
        """Whether it names a function that convolves, or something that holds one."""
        return self._convolving

    @property
    def takes_weights(self) -> bool:
        """Whether it names what may take a weight out of a convolution."""
        return not HANDED_OUT.isdisjoint(self.names)

    @cached_property
    def walks(self) -> bool:
        """Whether a function in it goes through modules and names their weights."""
        return any("weight" in texts(code) and not WALKS.isdisjoint(code.co_names) for code in self._codes)

    @cached_property
    def alters(self) -> bool:
        """Whether something in it changes weights in place, as far as names tell.

        That is an attribute ``weight`` or ``data``, or the variable of a loop in a function that names what takes
        weights out of modules.
        """
        handing = [not (HANDED_OUT | WALKS).isdisjoint(_names(codes)) for codes in self._functions]
        changed = [set().union(*map(changed_in_place, codes)) for codes in self._functions]
        loops = any(hands and LOOP in what for hands, what in zip(handing, changed, strict=True))
        return (
            loops or any("weight" in what for what in changed) or (any(handing) and any("data" in w for w in changed))
        )

    @cached_property
    def weights_read(self) -> set[str | None]:
        """Of what it reads the attribute ``weight``: names, of an item its index; None of anything else.

        Its dtype, device and shape do not count.
        """
        return set().union(*map(weights_read, self._codes))

    @property
    def selves(self) -> set[str]:
        """What it calls the module."""
        return {code.co_varnames[0] for code in self._codes if code.co_name == "forward" and code.co_argcount}


def _names(codes: Iterable[CodeType]) -> set[str]:
    return set().union(*(code.co_names for code in codes))


def _convolves(value: object) -> bool:
    """Whether it is a function that convolves, a partial one, or a short list or dict with one."""
    values = list(value.values()) if type(value) is dict else value if type(value) in (list, tuple) else [value]
    bare = [one.func if isinstance(one, partial) else one for one in values[:FEW]]  # type: ignore[index]
    return any(one is known for one in bare for known in CONVOLUTIONS)


def _classes_inside(module: nn.Module) -> Iterator[type]:
    """Classes of somebody's own of the convolutions in a module and in its lists."""
    for child in module._modules.values():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            yield from _classes_inside(child)
        elif isinstance(child, _ConvNd) and not str(type(child).__module__).startswith("torch."):
            yield type(child)


def _takes_weights(value: object) -> bool:
    """Whether it is a function that names what may take a weight out of a convolution, or that convolves."""
    functions = _functions(value) if isinstance(value, (FunctionType, MethodType, partial)) else ()
    for one in functions:
        if one not in _HELD:
            code = None if _is_librarys(one) else ForwardCode(object, one)
            _HELD[one] = code is not None and (code.takes_weights or code.convolves)
    return any(map(_HELD.get, functions))


def _is_plain_class(value: object) -> bool:
    return isinstance(value, type) and not issubclass(value, nn.Module)


def names_of(parts: Iterable[nn.Module]) -> set[str]:
    """The names in the code of the forward passes of several modules."""
    return set().union(*(code.names for code in {forward_code(part) for part in parts}))


_HELD = weakref.WeakKeyDictionary[FunctionType, bool]()  # whether it takes weights or convolves; it may hold a module
_code_of = lru_cache(maxsize=1024)(ForwardCode)


def _functions(value: object) -> list[FunctionType]:
    """The functions in a function, a method, a property, a partial one, or whatever a decorator made of them."""
    found, pending = list[FunctionType](), [value]
    for one in pending:
        if isinstance(one, (partial, partialmethod, cached_property)):
            pending.append(one.func)
        elif isinstance(one, (staticmethod, classmethod)):
            pending.append(one.__func__)
        elif isinstance(one, property):
            pending.append(one.fget)
        elif isinstance(one, MethodType):
            pending.append(one.__func__)
        elif isinstance(one, FunctionType) and one not in found:
            found.append(one)
            pending.append(getattr(one, "__wrapped__", None))
            with suppress(ValueError):  # a cell that is empty yet
                pending += [cell.cell_contents for cell in one.__closure__ or ()]
    return found


def _is_librarys(function: FunctionType) -> bool:
    """Whether it is one of torch's or of Python's own, whose names say nothing of a model."""
    return function.__module__ is None or function.__module__.partition(".")[0] in {"torch", *sys.stdlib_module_names}


def reads_weight(owner: nn.Module, name: str) -> bool:
    """Whether the forward pass of a module makes something of the weight of a convolution inside it, of that name.

    What is read of a variable may be of any, if a convolution is called.
    """
    code = forward_code(owner)
    others = dict(owner.named_children()).keys() - {name}
    if hasattr(owner, "weight"):
        others |= code.selves
    return any(read == name or (code.convolves and read not in others) for read in code.weights_read)


def reads_further_inside(module: nn.Module) -> bool:
    """Whether a forward pass seems to read or change weights of convolutions that are no children of the module."""
    code = forward_code(module)
    if not (code.walks or code.alters or code.weights_read):
        return False
    inside = {
        name.rpartition(".")[2]
        for name, one in module.named_modules()
        if isinstance(one, _ConvNd) and name and not _is_direct(module, name)
    }
    own = dict(module.named_children()).keys() | code.selves | {"self"}
    loops = code.convolves and not code.weights_read <= own  # over a sequence of them, perhaps
    return bool(inside) and (code.walks or code.alters or loops or not inside.isdisjoint(code.weights_read))


def _is_direct(module: nn.Module, name: str) -> bool:
    """Whether a part of a module lies in nothing but its lists."""
    above = name.rpartition(".")[0]
    return not above or (
        isinstance(module.get_submodule(above), (nn.ModuleList, nn.ModuleDict)) and _is_direct(module, above)
    )
