"""Finding the models that are built while some code runs, and those of their convolutions that were drawn there."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import Enum
from functools import partial

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import _disable_current_modes

from convsim_init.errors import InputError
from convsim_init.layers import tree
from convsim_init.layers.forward.isolation import is_running
from convsim_init.layers.forward.owners import find_call
from convsim_init.layers.memory import has_no_data
from convsim_init.layers.obstacle import Cause, Obstacle
from convsim_init.tracking.patching import ignore, noting_loaded, observed
from convsim_init.tracking.window import before_first_pass, drop_hooks

# An attribute of modules, which copies inherit: the token of the context that drew it, and None or a key of LEFT.
MARK = "_drawn_within"
ELSEWHERE = Obstacle("loaded, or built elsewhere: only what is drawn here is treated", Cause.BUILT_ELSEWHERE)
LOADED, TRAINED = "loaded", "trained"  # plain strings, so that a pickled mark needs no class of this package
LEFT = {
    LOADED: Obstacle("loaded in place of what was drawn here", Cause.LOADED),  # after its model was passed on
    TRAINED: Obstacle("trained already: it got a gradient before an optimizer was made"),
}


class Event(Enum):
    """When models are passed to the callback."""

    OPTIMIZER = "before an optimizer is made"
    FORWARD = "before the first forward pass after that, or when the context ends, if there was none"
    STEP = "before the first step of an optimizer, if the forward pass was not seen"
    END = "when the context ends"


Callback = Callable[[Sequence[nn.Module], Event], None]
_open_tokens = set[str]()  # of the contexts that are open: a mark in a file may be of another one
# By ids, because modules need not be hashable; weak, so that an id is forgotten before another module may get it.
_ModulesById = weakref.WeakValueDictionary[int, nn.Module]


class UnmatchedError(InputError):
    """A pattern matches no layer of the models that are built in a context."""


class Construction:
    """Context that finds the models that are built in it, and passes them to a callback when they should be treated.

    That is when an optimizer is made, because training is about to begin, or else when the context ends. They are
    passed on again before the first forward pass of one of them after that, because they may have been drawn anew in
    between; before a later optimizer if the ``reset_parameters`` of a convolution drew it anew or it was loaded, as
    between the folds of a cross-validation; and before an optimizer gets more parameters if something was built since.
    A model is a module, built or copied in the context, that is part of no other one and has a convolution that was
    built or copied there, too. A module whose weights have no data is no model.
    """

    def __init__(self, callback: Callback, on_optimizer: Callable[[object], None] = ignore) -> None:
        self._callback = callback
        self._on_optimizer = on_optimizer  # gets what an optimizer is made with, before the models are passed
        self._token = uuid.uuid4().hex
        self._marked = _ModulesById()
        self._ever_built = _ModulesById()  # built or copied at any time
        self._built = _ModulesById()  # built or copied since the last notification
        self._notified = _ModulesById()  # models that were passed on and are not trained yet
        self._ever_notified = _ModulesById()  # models that were passed on at any time
        self._redrawn = _ModulesById()  # since an optimizer was made
        self._loaded = _ModulesById()  # since the last notification
        self._with_gradient = set[int]()  # ids of the parameters that had a gradient when the optimizer was made
        self._notifying = False  # copies and forward passes meanwhile are not the user's
        self._window = ExitStack()  # from the making of an optimizer to the first forward pass
        self._observers = ExitStack()

    def __enter__(self) -> Construction:
        _open_tokens.add(self._token)
        for observing in (
            observed(nn.Module, "__init__", after=self._note_drawn),
            # deepcopy and pickle make a module without calling its constructor.
            observed(nn.Module, "__setstate__", after=self._note_built),
            noting_loaded(self._note_loaded),
            observed(_ConvNd, "reset_parameters", after=self._note_redrawn),
            observed(torch.optim.Optimizer, "__init__", before=self._before_optimizer),
            observed(torch.optim.Optimizer, "add_param_group", before=self._before_group),
            observed(torch.autograd, "backward", after=self._after_backward),
        ):
            self._observers.enter_context(observing)
        self._observers.callback(register_optimizer_step_pre_hook(self._before_step).remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._observers.close()
        self._window.close()
        try:
            if kind is None:
                earlier, self._notified = self._notified, _ModulesById()
                self._notify(Event.END)  # first, because the callback checks patterns once all models are known
                self._notified = earlier
                self._notify_again(Event.FORWARD)
        finally:
            _open_tokens.remove(self._token)
            _unmark(self._marked.values())

    def _note_drawn(self, module: nn.Module, /, *_: object, **__: object) -> None:
        if not (self._notifying or is_running() or _on_meta()):
            self._mark(module)
        self._note_built(module)

    def _note_built(self, module: nn.Module, /, *_: object, **__: object) -> None:
        drop_hooks(module)  # a copy inherits them
        if not (self._notifying or is_running()):
            self._ever_built[id(module)] = self._built[id(module)] = self._marked[id(module)] = module

    def _note_redrawn(self, module: _ConvNd, /) -> None:
        weight = module._parameters.get("weight")  # None if it is computed, which reset_parameters does not change
        if weight is None or has_no_data(weight) or self._notifying or is_running():
            return
        self._redrawn[id(module)] = module
        self._loaded.pop(id(module), None)
        if id(module) in self._ever_built:
            self._mark_redrawn(module)  # now, so that copies made of it inherit the mark

    def _after_backward(self, *_: object, **__: object) -> None:
        models = () if self._notifying else self._notified.values()
        parameters = (parameter for model in models for parameter in tree.parameters(model))
        # Such a gradient is of a forward pass that no hook saw.
        if any(_has_gradient(parameter) and id(parameter) not in self._with_gradient for parameter in parameters):
            self._notify_again(Event.STEP)
        # Code that makes its steps by hand may train a module without an optimizer.
        for module in (*self._marked.values(), *self._redrawn.values()):
            if any(map(_has_gradient, module._parameters.values())):
                self._redrawn.pop(id(module), None)
                if MARK in vars(module):
                    self._mark(module, TRAINED)

    def _mark_redrawn(self, module: nn.Module) -> None:
        if vars(module).get(MARK) in (None, (self._token, TRAINED)):
            self._mark(module)
            self._marked[id(module)] = module

    def _mark(self, module: nn.Module, why: str | None = None) -> None:
        vars(module)[MARK] = (self._token, why)

    def _note_loaded(self, module: nn.Module) -> None:
        _unmark([module])
        self._redrawn.pop(id(module), None)
        self._loaded[id(module)] = module

    def _before_optimizer(
        self, optimizer: torch.optim.Optimizer, /, params: object = (), *_: object, **__: object
    ) -> None:
        if not _is_own(optimizer):
            self._begin_training(params)

    def _before_group(self, optimizer: torch.optim.Optimizer, /, *_: object, **__: object) -> None:
        # Layers may be built after the optimizer was made, as in the first forward pass.
        if self._built and not (self._notifying or _is_own(optimizer)):
            self._begin_training()

    def _begin_training(self, params: object = ()) -> None:
        self._window.close()
        self._notify(Event.OPTIMIZER, params)
        models = list(self._notified.values())
        parameters = [parameter for model in models for parameter in tree.parameters(model)]
        self._with_gradient = {id(parameter) for parameter in parameters if _has_gradient(parameter)}
        if models:
            self._window.enter_context(before_first_pass(models, partial(self._notify_again, Event.FORWARD)))

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if torch.compiler.is_compiling() or _is_own(optimizer):
            return
        if self._notified:
            self._notify_again(Event.STEP)
        # A module that was drawn anew and is trained now must not be treated before a later optimizer.
        if self._redrawn:
            parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
            trained = {id(parameter) for parameter in parameters if _has_gradient(parameter)}
            for model in list(self._ever_notified.values()):
                if any(id(parameter) in trained for parameter in tree.parameters(model)):
                    for part in tree.modules(model):
                        self._redrawn.pop(id(part), None)

    @contextmanager
    def _own_work(self) -> Iterator[None]:
        """Context for work that is not the user's, and that no mode sees which counts operations or fakes tensors."""
        self._notifying = True
        try:
            with _disable_current_modes():
                yield
        finally:
            self._notifying = False
            _unmark(self._loaded.values())
            self._loaded.clear()

    def _notify(self, event: Event, params: object = ()) -> None:
        with self._own_work():
            roots = _roots(list(self._built.values()))
            models, new = [*roots, *self._ever_notified.values()], set(map(id, roots))
            # A model is passed on again if a part of it was drawn anew, was loaded or is a new model.
            changed = {id(model) for model in models if self._mark_redrawn_in(model) | self._mark_loaded_in(model)}
            passed_on = {
                id(model): model
                for model in _outermost(models)
                if id(model) in changed or not new.isdisjoint(map(id, tree.modules(model)))
            }
            self._built.clear()
            self._redrawn.clear()
            self._notified.update(passed_on)
            self._ever_notified.update(passed_on)
            if passed_on:
                self._on_optimizer(params)
            self._callback(list(passed_on.values()), event)

    def _mark_redrawn_in(self, model: nn.Module) -> bool:
        """Mark the parts of a model that were drawn anew, even if built elsewhere; whether there are any."""
        redrawn = [part for part in tree.modules(model) if id(part) in self._redrawn] if self._redrawn else []
        for part in redrawn:
            self._mark_redrawn(part)
        return bool(redrawn)

    def _mark_loaded_in(self, model: nn.Module) -> bool:
        """Mark the parts of a model that were loaded after it was passed on; whether there are any."""
        may_be = self._loaded and id(model) in self._ever_notified
        loaded = [part for part in tree.modules(model) if id(part) in self._loaded] if may_be else []
        for part in loaded:
            self._mark(part, LOADED)
        return bool(loaded)

    def _notify_again(self, event: Event) -> None:
        self._window.close()
        models = list(self._notified.values())
        self._notified.clear()
        with self._own_work():
            for model in models:
                self._mark_loaded_in(model)
            self._callback(models, event)
        parts = [part for model in models for part in tree.modules(model)]
        _unmark(parts)
        for part in parts:
            self._redrawn.pop(id(part), None)
            self._marked.pop(id(part), None)


def left_alone(module: nn.Module | None) -> Obstacle | None:
    """Why a module's weight must stay; None if it was drawn in a `Construction` that is still open."""
    marks = [vars(part).get(MARK) for part in tree.modules(module)] if module is not None else []
    if not marks or marks[0] is None or marks[0][0] not in _open_tokens:
        return ELSEWHERE
    return next((LEFT[why] for _, why in filter(None, marks) if why), None)


def _is_own(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a descent of this package made the optimizer, so that it trains no network."""
    return type(optimizer).__module__.partition(".")[0] == __name__.partition(".")[0]


def _has_gradient(parameter: nn.Parameter | None) -> bool:
    # Asked for the gradient of a tensor that is no leaf, as meta-learning steps make, torch warns.
    return parameter is not None and parameter.is_leaf and parameter.grad is not None


def _on_meta() -> bool:
    """Whether modules are built without data; no tracer sees the tensor that shows it."""
    with _disable_current_modes():
        return torch.empty(0).is_meta


def _unmark(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        vars(module).pop(MARK, None)


def _roots(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """The outermost of some modules, if a convolution among these modules is a part of them."""
    built = set(map(id, modules))
    return [
        module
        for module in _outermost(modules)
        if any(id(part) in built and _convolves(part) for part in tree.modules(module))
    ]


def _outermost(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules that are part of no other one of them."""
    inner = {id(part) for module in modules for part in list(tree.modules(module))[1:]}
    return [module for module in modules if id(module) not in inner]


def _convolves(module: nn.Module) -> bool:
    """Whether a module is a convolution of PyTorch or of a user's class, and its parameters have data."""
    if any(map(has_no_data, tree.parameters(module))):
        return False
    return isinstance(module, _ConvNd) or find_call(module) is not None
