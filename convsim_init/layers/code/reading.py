"""What the code of a forward pass says of the weights that it uses: from the names in it, nothing is run."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache, partial, partialmethod
from inspect import getattr_static
from types import CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.conv import _ConvNd

from convsim_init.layers import tree
from convsim_init.layers.code.bytecode import asked_of_bases, global_names, names_convolution, texts, weights_read
from convsim_init.layers.code.changes import (
    ARGUMENT,
    HANDED_OUT,
    ITERATED,
    REPLACING,
    RESULT,
    WALKS,
    changed_in_place,
)
from convsim_init.layers.code.held import enclosed, flat, held_by, is_librarys, is_plain

TRANSPOSED = {F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d, torch.convolution, *TRANSPOSED}
EMPTY: Mapping[str, Any] = MappingProxyType({})
PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
METHODS = ("__call__", "forward", "_conv_forward")
CALLS = {"_conv_forward", *(call.__name__ for call in CONVOLUTIONS)}
CALLED = ("__call__", "_call_impl")  # before a forward pass
MAX_CODE = 1000  # functions that a forward pass is followed into


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
    held = _held(module)
    helpers = frozenset(_classes_inside(module))
    if own is not None or held or type(forward).__hash__ is None:  # not kept in the cache: they may hold the module
        return ForwardCode(kind, forward, helpers, held)
    return _code_of(kind, forward, helpers)


def hook_code(hook: Any) -> ForwardCode:
    """The code of a hook; without any of one of a library's own."""
    owner = hook.__self__ if isinstance(hook, MethodType) else hook
    kind, held = (type(owner), _held(owner)) if is_plain(owner) or isinstance(owner, nn.Module) else (object, EMPTY)
    return ForwardCode(kind, None if all(map(is_librarys, _functions(hook))) else hook, held=held)


class ForwardCode:
    """The code of a forward pass, of the functions in it, and of the methods and functions that it names.

    Args:
        kind: Class of the module.
        forward: Its forward pass.
        helpers: Classes of convolutions inside it, whose own methods it may call.
        held: What its attributes hold and has to do with weights or convolutions, by their names.
    """

    def __init__(
        self, kind: Any, forward: Any, helpers: Iterable[type] = (), held: Mapping[str, Sequence[object]] = EMPTY
    ) -> None:
        self._functions: list[tuple[bool, list[CodeType]]] = []  # whether it is a method of the class; codes within
        self._codes: list[CodeType] = []
        self._convolving = False
        self._handing = HANDED_OUT | {name for name, values in held.items() if any(map(_is_parameter, values))}
        calls = [each for name in CALLED for each in _functions(getattr(kind, name, None)) if not is_librarys(each)]
        pending = [*_functions(forward), *calls]
        methods, plain = set(pending), set[type]()
        for function in pending:
            if function.__code__ in self._codes or len(self._codes) > MAX_CODE:
                continue
            inner, selves = [function.__code__], {"self", *function.__code__.co_varnames[:1]}
            for one in inner:
                inner += [constant for constant in one.co_consts if isinstance(constant, CodeType)]
                known = [each for name in global_names(one) for each in flat(function.__globals__.get(name))]
                known += [*flat(function)][1:]
                self._handing |= {name for name, value in enclosed(function) if any(map(_is_parameter, flat(value)))}
                own = [each for name in one.co_names for each in flat(getattr(kind, name, None))]
                methods.update(each for value in own for each in _functions(value))
                own += [each for name in one.co_names for each in held.get(name, ())]
                libraries = any(isinstance(each, ModuleType) for each in own) and not CALLS.isdisjoint(one.co_names)
                self._convolving |= (
                    any(map(_convolves, known + own)) or libraries or names_convolution(one, selves, CALLS)
                )
                spaces = [one for one in known if isinstance(one, ModuleType) or _is_plain_class(one)]
                known += own
                plain.update(type(each) for each in known if is_plain(each))
                for name in one.co_names:
                    known += [vars(space).get(name) for space in spaces]
                    known += [getattr_static(each, name, None) for each in plain]
                    if not hasattr(nn.Module, name):
                        known += [getattr(helper, name, None) for helper in helpers]
                for name in asked_of_bases(one, kind.__mro__):
                    asked = [vars(base).get(name) for base in kind.__mro__]
                    methods.update(each for value in asked for each in _functions(value))
                    known += asked
                pending += [each for value in known for each in _functions(value) if not is_librarys(each)]
            self._codes += inner
            self._functions.append((function in methods, inner))

    @cached_property
    def names(self) -> set[str]:
        """The names of attributes and functions in it, and strings that may be names."""
        return set().union(*map(texts, self._codes))

    @property
    def convolves(self) -> bool:
        """Whether it names a function that convolves, or something that holds one."""
        return self._convolving

    @property
    def changes(self) -> bool:
        """Whether it changes anything in place."""
        return any(map(changed_in_place, self._codes))

    @property
    def takes_weights(self) -> bool:
        """Whether it names what may take a weight out of a convolution, or give it another one."""
        return not (HANDED_OUT | REPLACING).isdisjoint(self.names) or bool(self.altered)

    @cached_property
    def walks(self) -> bool:
        """Whether a function in it goes through modules and names their weights."""
        return any("weight" in texts(code) and not WALKS.isdisjoint(code.co_names) for code in self._codes)

    @cached_property
    def altered(self) -> set[frozenset[str]]:
        """What it changes in place that may be weights of the modules inside, as far as names tell, each by its names.

        With `ARGUMENT` where those are not all of them the class's own.
        """
        naming = [not (self._handing | WALKS).isdisjoint(_names(codes)) for _, codes in self._functions]
        found = set[frozenset[str]]()
        for hands, (method, codes) in zip(naming, self._functions, strict=True):
            for what in set[frozenset[str]]().union(*map(changed_in_place, codes)):
                given = (hands and ITERATED in what) or (any(naming) and {ARGUMENT, "data"} <= what)
                beside = (method and what <= {"weight", "data"}) or "grad" in what
                beside |= not method and RESULT in what  # whose it is, nothing tells
                if not beside and (given or not self._handing.isdisjoint(what)):
                    found.add(what if method else what | {ARGUMENT})
        return found

    def alters(self, names: Collection[str], children: Collection[str]) -> bool:
        """Whether it may change weights in children of those names, given the names of all."""
        return any(ARGUMENT in what or not what.isdisjoint(names) or what.isdisjoint(children) for what in self.altered)

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
    """Whether it is a function that convolves, or a partial one."""
    bare = value.func if isinstance(value, partial) else value
    return any(bare is known for known in CONVOLUTIONS)


def _is_parameter(value: object) -> bool:
    return isinstance(value, nn.Parameter)


def _held(owner: object) -> dict[str, list[object]]:
    """What the attributes of a module or object hold and has to do with weights or convolutions."""
    found = held_by(owner)
    if isinstance(owner, nn.Module) and owner._parameters and not isinstance(owner, _ConvNd):  # of one inside, perhaps
        inside = {id(p) for one in tree.modules(owner) if isinstance(one, _ConvNd) for p in one._parameters.values()}
        found |= {name: [one] for name, one in owner._parameters.items() if one is not None and id(one) in inside}
    kept = {name: [one for one in values if _matters(one)] for name, values in found.items()}
    return {name: values for name, values in kept.items() if values}


def _classes_inside(module: nn.Module) -> Iterator[type]:
    """Classes of somebody's own of the convolutions in a module and in its lists."""
    for child in module._modules.values():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            yield from _classes_inside(child)
        elif isinstance(child, _ConvNd) and not str(type(child).__module__).startswith("torch."):
            yield type(child)


def _matters(value: object) -> bool:
    """Whether it holds a weight, convolves, names what may take a weight out of a convolution, or has such methods."""
    if isinstance(value, (ModuleType, nn.Parameter)) or _convolves(value):
        return True
    methods = [each for base in type(value).__mro__ for each in vars(base).values()] if is_plain(value) else [value]
    return any(_takes_weights(each) for method in methods for each in _functions(method) if not is_librarys(each))


def _takes_weights(function: FunctionType) -> bool:
    if function not in _HELD:
        code = ForwardCode(object, function)
        _HELD[function] = code.takes_weights or code.convolves or code.changes
    return _HELD[function]


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
        elif is_plain(one):
            pending.append(getattr_static(type(one), "__call__", None))
        elif isinstance(one, FunctionType) and one not in found:
            found.append(one)
            pending.append(getattr(one, "__wrapped__", None))
            pending += [value for _, value in enclosed(one)]
    return found
