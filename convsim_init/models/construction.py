"""Which models are built while some code runs, and which of their convolutions hold weights that were drawn there."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

MARK = "_drawn_within"  # an attribute of the convolution itself, so that its copies have it too

Treat = Callable[[Sequence[nn.Module], bool], None]


class Construction:
    """Context that finds the models that are built in it, and tells when they are to be treated.

    That is when an optimizer is made, because training is about to begin, or else when the context ends. Before the
    first forward pass after an optimizer was made they are told again, for what was drawn anew in between. A model is a
    module, built or copied in the context, that is part of no other one and has a convolution that was.

    Args:
        treat: What is called with the models, and with whether they were told before.
    """

    def __init__(self, treat: Treat) -> None:
        self._treat = treat
        self._built: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()  # and not told yet
        self._told: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()  # and not trained yet
        self._telling = False  # then copies that are made, and forward passes, are none of the context's
        self._undo = ExitStack()

    def __enter__(self) -> Construction:
        self._undo.enter_context(_replaced(nn.Module, "__init__", self._record))
        self._undo.enter_context(_replaced(nn.Module, "__setstate__", self._record))  # of a copy
        self._undo.enter_context(_replaced(_ConvNd, "__init__", _marking))
        self._undo.enter_context(_replaced(nn.Module, "_load_from_state_dict", _unmarking))
        self._undo.enter_context(_replaced(torch.optim.Optimizer, "__init__", self._before_optimizer))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._undo.close()
        if kind is None:
            self._tell()
        self._forget()

    def _record(self, make: Callable[..., None]) -> Callable[..., None]:
        @wraps(make)
        def recorded(module: nn.Module, *args: Any, **kwargs: Any) -> None:
            make(module, *args, **kwargs)
            if not self._telling:
                self._built[id(module)] = module

        return recorded

    def _before_optimizer(self, init: Callable[..., None]) -> Callable[..., None]:
        @wraps(init)
        def after_telling(optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
            self._tell()
            if self._told:
                handle = register_module_forward_pre_hook(lambda *_: self._begin(handle))
                self._undo.callback(handle.remove)
            init(optimizer, *args, **kwargs)

        return after_telling

    def _begin(self, handle: RemovableHandle) -> None:
        if self._telling:
            return
        handle.remove()
        self._call(list(self._told.values()), again=True)
        self._forget()

    def _call(self, models: Sequence[nn.Module], *, again: bool) -> None:
        self._telling = True
        try:
            self._treat(models, again)
        finally:
            self._telling = False

    def _tell(self) -> None:
        models = _roots(list(self._built.values()))
        self._built.clear()
        self._told.update({id(model): model for model in models})
        self._call(models, again=False)

    def _forget(self) -> None:
        for model in self._told.values():
            for module in model.modules():
                vars(module).pop(MARK, None)
        self._told.clear()


def is_drawn(module: _ConvNd) -> bool:
    """Whether its weight was drawn in a `Construction` that is not over, and not loaded since."""
    return MARK in vars(module)


def drawn_anew(module: _ConvNd) -> bool:
    """Whether it was never settled, or has other weights than then."""
    return bool(vars(module)[MARK] != _checksum(module))


def settle(module: _ConvNd) -> None:
    """Note the weights that it has now as its final ones."""
    vars(module)[MARK] = _checksum(module)


def _checksum(module: _ConvNd) -> float:
    return sum(float(one.detach().cpu().double().sum()) for one in module.parameters() if not is_lazy(one))


def _marking(init: Callable[..., None]) -> Callable[..., None]:
    @wraps(init)
    def marked(module: _ConvNd, *args: Any, **kwargs: Any) -> None:
        init(module, *args, **kwargs)
        if not module.weight.is_meta:
            vars(module)[MARK] = None

    return marked


def _unmarking(load: Callable[..., None]) -> Callable[..., None]:
    @wraps(load)
    def unmarked(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        load(module, state_dict, prefix, *args, **kwargs)
        if isinstance(module, _ConvNd) and any(key.startswith(prefix) for key in state_dict):
            vars(module).pop(MARK, None)

    return unmarked


@contextmanager
def _replaced(owner: type, name: str, change: Callable[..., Callable[..., None]]) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, change(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


def _roots(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Those that are part of no other of these modules and have one of them that is a convolution."""
    parts = {module: list(module.modules()) for module in modules}
    inner = {part for module, its in parts.items() for part in its if part is not module}
    return [
        module
        for module in modules
        if module not in inner and any(isinstance(part, _ConvNd) and part in parts for part in parts[module])
    ]
