"""Which models are built while some code runs, and which of their convolutions hold weights that were drawn there."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import register_module_forward_pre_hook

from convsim_init.errors import InputError
from convsim_init.layers.forward.standardized import find_call
from convsim_init.layers.forward.trial import TRIALS
from convsim_init.layers.memory import has_no_data

MARK = "_drawn_within"  # an attribute of the module itself, so that its copies have it too: None, or why to leave it
ELSEWHERE = "loaded, or built elsewhere: only what is drawn here is treated"
TRAINED = "trained already: it got a gradient before an optimizer was made"

Treat = Callable[[Sequence[nn.Module], bool], None]
_Modules = weakref.WeakValueDictionary[int, nn.Module]  # by their ids: they need not be hashable


class UnmatchedError(InputError):
    """A pattern matches no layer of the models that are built in a context."""


class Construction:
    """Context that finds the models that are built in it, and tells when they are to be treated.

    That is when an optimizer is made, because training is about to begin, or else when the context ends. Before the
    first forward pass of one of them after that they are told again, for what was drawn anew in between. A model is a
    module, built or copied in the context, that is part of no other one and has a convolution that was. Those whose
    weights have no data do not count.

    Args:
        treat: What is called with the models, and with whether they were told before.
    """

    def __init__(self, treat: Treat) -> None:
        self._treat = treat
        self._marked = _Modules()
        self._built = _Modules()  # and not told yet
        self._told = _Modules()  # and not trained yet
        self._telling = False  # then copies that are made, and forward passes, are none of the context's
        self._window = ExitStack()  # from an optimizer to the first forward pass
        self._undo = ExitStack()

    def __enter__(self) -> Construction:
        self._undo.enter_context(_replaced(nn.Module, "__init__", self._marking))
        self._undo.enter_context(_replaced(nn.Module, "__setstate__", self._recording))  # of a copy
        self._undo.enter_context(noting_loaded(lambda module: _unmark([module])))
        self._undo.enter_context(_replaced(torch.optim.Optimizer, "__init__", self._before_optimizer))
        self._undo.enter_context(_replaced(torch.autograd, "backward", self._marking_trained))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._undo.close()
        self._window.close()
        try:
            if kind is None:
                self._tell_again()
                self._tell()
        finally:
            _unmark(self._marked.values())

    def _recording(self, make: Callable[..., None]) -> Callable[..., None]:
        @wraps(make)
        def recorded(module: nn.Module, *args: Any, **kwargs: Any) -> None:
            make(module, *args, **kwargs)
            if not self._telling:
                self._built[id(module)] = self._marked[id(module)] = module

        return recorded

    def _marking(self, init: Callable[..., None]) -> Callable[..., None]:
        def marked(module: nn.Module, *args: Any, **kwargs: Any) -> None:
            init(module, *args, **kwargs)
            if not (self._telling or torch.empty(0).is_meta):
                vars(module)[MARK] = None

        return self._recording(wraps(init)(marked))

    def _marking_trained(self, backward: Callable[..., None]) -> Callable[..., None]:
        @wraps(backward)
        def marking(*args: Any, **kwargs: Any) -> None:
            backward(*args, **kwargs)
            for module in list(self._marked.values()):
                has_gradient = any(one is not None and one.grad is not None for one in module._parameters.values())
                if has_gradient and MARK in vars(module):
                    vars(module)[MARK] = TRAINED

        return marking

    def _before_optimizer(self, init: Callable[..., None]) -> Callable[..., None]:
        @wraps(init)
        def after_telling(optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
            self._window.close()
            self._tell()
            named = [named for model in self._told.values() for named in model.named_modules()]
            # Parametrizations run whenever their weight is looked at.
            parts = {id(part) for name, part in named if "parametrizations" not in name.split(".")}

            def before_call(module: nn.Module, _: object) -> None:
                if not (self._telling or TRIALS) and any(id(part) in parts for part in module.modules()):
                    self._window.close()
                    self._tell_again()

            if parts:
                self._window.callback(register_module_forward_pre_hook(before_call).remove)
            init(optimizer, *args, **kwargs)

        return after_telling

    def _tell(self) -> None:
        self._telling = True
        try:
            models = _roots(list(self._built.values()))
            self._built.clear()
            self._told.update({id(model): model for model in models})
            self._treat(models, False)
        finally:
            self._telling = False

    def _tell_again(self) -> None:
        models = list(self._told.values())
        self._told.clear()
        self._telling = True
        try:
            self._treat(models, True)
        finally:
            self._telling = False
        for model in models:
            _unmark(model.modules())
            for part in model.modules():
                self._marked.pop(id(part), None)


def left_alone(module: nn.Module | None) -> str | None:
    """Why a module's weight is to stay; None if it was drawn in a `Construction` that is not over."""
    if module is None or MARK not in vars(module):
        return ELSEWHERE
    return next(filter(None, (vars(part).get(MARK) for part in module.modules())), None)


def _unmark(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        vars(module).pop(MARK, None)


@contextmanager
def noting_loaded(note: Callable[[nn.Module], None]) -> Iterator[None]:
    """Context in which a function is called with each module that something else than its constructor fills.

    That is what ``load_state_dict`` fills, and a convolution that is made without data, as transformers makes those
    that it loads.
    """

    def noting(load: Callable[..., None]) -> Callable[..., None]:
        @wraps(load)
        def noted(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
            load(module, state_dict, prefix, *args, **kwargs)
            if any(key.startswith(prefix) for key in state_dict):
                note(module)

        return noted

    def noting_meta(init: Callable[..., None]) -> Callable[..., None]:
        @wraps(init)
        def noted(module: _ConvNd, *args: Any, **kwargs: Any) -> None:
            init(module, *args, **kwargs)
            if module.weight.is_meta:
                note(module)

        return noted

    with _replaced(nn.Module, "_load_from_state_dict", noting), _replaced(_ConvNd, "__init__", noting_meta):
        yield


@contextmanager
def _replaced(owner: object, name: str, change: Callable[..., Callable[..., None]]) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, change(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


def _roots(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Those that are part of no other of these modules and have one of them that is a convolution."""
    built = {id(module) for module in modules}
    parts = {id(module): list(module.modules()) for module in modules}
    inner = {id(part) for module in modules for part in parts[id(module)][1:]}
    return [
        module
        for module in modules
        if id(module) not in inner and any(id(part) in built and _convolves(part) for part in parts[id(module)])
    ]


def _convolves(module: nn.Module) -> bool:
    """Whether it is a convolution, of PyTorch's or of a class of somebody's own, whose parameters have data."""
    if any(map(has_no_data, module.parameters())):
        return False
    return isinstance(module, _ConvNd) or find_call(module) is not None
