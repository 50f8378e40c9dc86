"""Which models are built while some code runs, and which of their convolutions hold weights that were drawn there."""

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
from convsim_init.layers.memory import has_no_data
from convsim_init.layers.obstacle import Cause, Obstacle
from convsim_init.layers.owners import find_call
from convsim_init.tracking.patching import noting_loaded, observed
from convsim_init.tracking.window import before_first_pass, drop_hooks

MARK = "_drawn_within"  # an attribute of a module, so that its copies have it too: the context, and why to leave it
ELSEWHERE = Obstacle("loaded, or built elsewhere: only what is drawn here is treated", Cause.BUILT_ELSEWHERE)
LOADED, TRAINED = "loaded", "trained"  # in marks, which a pickled model keeps: no classes of this package
LEFT = {
    LOADED: Obstacle("loaded in place of what was drawn here", Cause.LOADED),  # after the model was told
    TRAINED: Obstacle("trained already: it got a gradient before an optimizer was made"),
}


class Moment(Enum):
    """When models are told."""

    OPTIMIZER = "before an optimizer is made"
    FORWARD = "before the first forward pass after that, or when the context ends, if there was none"
    STEP = "before the first step of an optimizer, if the forward pass was not seen"
    END = "when the context ends"


Treat = Callable[[Sequence[nn.Module], Moment], None]
_OPEN = set[str]()  # contexts: what is loaded from a file may have been drawn in another one
# Weak: nothing is kept alive, and an id is forgotten before another module may have it.
_Modules = weakref.WeakValueDictionary[int, nn.Module]  # by their ids: they need not be hashable


class UnmatchedError(InputError):
    """A pattern matches no layer of the models that are built in a context."""


class Construction:
    """Context that finds the models that are built in it, and tells when they are to be treated.

    That is when an optimizer is made, because training is about to begin, or else when the context ends. Before the
    first forward pass of one of them after that they are told again, for what was drawn anew in between. They are also
    told again before a later optimizer if a convolution's ``reset_parameters`` drew it anew or it was loaded, as
    between the folds of a cross-validation, and before an optimizer gets more parameters if something was built since.
    A model is a module, built or copied in the context, that is part of no other one and has a convolution that was.
    Those whose weights have no data do not count.
    """

    def __init__(self, treat: Treat) -> None:
        self._treat = treat
        self._token = uuid.uuid4().hex
        self._marked = _Modules()
        self._made = _Modules()  # built or copied at any time
        self._built = _Modules()  # and not told yet
        self._told = _Modules()  # and not trained yet
        self._models = _Modules()  # told at any time
        self._redrawn = _Modules()  # since an optimizer was made
        self._loaded = _Modules()  # since models were told
        self._graded = set[int]()  # parameters, by their ids, that had a gradient then
        self._telling = False  # then copies that are made, and forward passes, are none of the context's
        self._window = ExitStack()  # from an optimizer to the first forward pass
        self._undo = ExitStack()

    def __enter__(self) -> Construction:
        _OPEN.add(self._token)
        for observing in (
            observed(nn.Module, "__init__", after=self._note_drawn),
            # deepcopy and pickle make a module without its constructor.
            observed(nn.Module, "__setstate__", after=self._note_built),  # of a copy
            noting_loaded(self._leave),
            observed(_ConvNd, "reset_parameters", after=self._note_redrawn),
            observed(torch.optim.Optimizer, "__init__", before=self._before_optimizer),
            observed(torch.optim.Optimizer, "add_param_group", before=self._before_group),
            observed(torch.autograd, "backward", after=self._after_backward),
        ):
            self._undo.enter_context(observing)
        self._undo.callback(register_optimizer_step_pre_hook(self._before_step).remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._undo.close()
        self._window.close()
        try:
            if kind is None:
                before, self._told = self._told, _Modules()  # patterns are checked once all models are known
                self._tell(Moment.END)
                self._told = before
                self._tell_again(Moment.FORWARD)
        finally:
            _OPEN.remove(self._token)
            _unmark(self._marked.values())

    def _note_drawn(self, module: nn.Module, /, *_: object, **__: object) -> None:
        if not (self._telling or is_running() or _on_meta()):
            self._mark(module)
        self._note_built(module)

    def _note_built(self, module: nn.Module, /, *_: object, **__: object) -> None:
        drop_hooks(module)  # of a copy
        if not (self._telling or is_running()):
            self._made[id(module)] = self._built[id(module)] = self._marked[id(module)] = module

    def _note_redrawn(self, module: _ConvNd, /) -> None:
        weight = module._parameters.get("weight")  # what is computed stays
        if weight is None or has_no_data(weight) or self._telling or is_running():
            return
        self._redrawn[id(module)] = module
        self._loaded.pop(id(module), None)
        if id(module) in self._made:  # now, for copies that are made of it
            self._mark_redrawn(module)

    def _after_backward(self, *_: object, **__: object) -> None:
        told = () if self._telling else self._told.values()
        # A gradient that was not there when the optimizer was made: of a pass that no hook saw.
        parameters = (one for model in told for one in tree.parameters(model))
        if any(_has_gradient(one) and id(one) not in self._graded for one in parameters):
            self._tell_again(Moment.STEP)  # the forward pass was not seen
        # A gradient may train it without an optimizer, by code that steps by hand.
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

    def _leave(self, module: nn.Module) -> None:
        _unmark([module])
        self._redrawn.pop(id(module), None)
        self._loaded[id(module)] = module

    def _before_optimizer(self, optimizer: torch.optim.Optimizer, /, *_: object, **__: object) -> None:
        if not _is_own(optimizer):
            self._begin_training()

    def _before_group(self, optimizer: torch.optim.Optimizer, /, *_: object, **__: object) -> None:
        # What was built since the optimizer was made, as layers in the first forward pass are.
        if self._built and not (self._telling or _is_own(optimizer)):
            self._begin_training()

    def _begin_training(self) -> None:
        self._window.close()
        self._tell(Moment.OPTIMIZER)
        models = list(self._told.values())
        parameters = [one for model in models for one in tree.parameters(model)]
        self._graded = {id(one) for one in parameters if _has_gradient(one)}
        if models:
            self._window.enter_context(before_first_pass(models, partial(self._tell_again, Moment.FORWARD)))

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if torch.compiler.is_compiling() or _is_own(optimizer):
            return
        if self._told:
            self._tell_again(Moment.STEP)
        # What was drawn anew and is trained now is not to be treated before a later optimizer.
        if self._redrawn:
            trained = {id(one) for group in optimizer.param_groups for one in group["params"] if _has_gradient(one)}
            for model in list(self._models.values()):
                if any(id(one) in trained for one in tree.parameters(model)):
                    for part in tree.modules(model):
                        self._redrawn.pop(id(part), None)

    @contextmanager
    def _own_work(self) -> Iterator[None]:
        """Context in which nothing is the user's, nor seen by a mode that counts operations or fakes tensors."""
        self._telling = True
        try:
            with _disable_current_modes():
                yield
        finally:
            self._telling = False
            _unmark(self._loaded.values())
            self._loaded.clear()

    def _tell(self, moment: Moment) -> None:
        with self._own_work():
            roots = _roots(list(self._built.values()))
            models, new = [*roots, *self._models.values()], set(map(id, roots))
            # A model that was told is told again if a part was drawn anew or loaded, or a new one is in it.
            changed = {id(model) for model in models if self._marks_redrawn(model) | self._marks_loaded(model)}
            told = {
                id(model): model
                for model in _outermost(models)
                if id(model) in changed or not new.isdisjoint(map(id, tree.modules(model)))
            }
            self._built.clear()
            self._redrawn.clear()
            self._told.update(told)
            self._models.update(told)
            self._treat(list(told.values()), moment)

    def _marks_redrawn(self, model: nn.Module) -> bool:
        """Whether a part of a model was drawn anew since it was told; each is marked, if built elsewhere too."""
        redrawn = [part for part in tree.modules(model) if id(part) in self._redrawn] if self._redrawn else []
        for part in redrawn:
            self._mark_redrawn(part)
        return bool(redrawn)

    def _marks_loaded(self, model: nn.Module) -> bool:
        """Whether a part of a model that was told before was loaded since then; each of them is marked."""
        known = self._loaded and id(model) in self._models
        loaded = [part for part in tree.modules(model) if id(part) in self._loaded] if known else []
        for part in loaded:
            self._mark(part, LOADED)
        return bool(loaded)

    def _tell_again(self, moment: Moment) -> None:
        self._window.close()
        models = list(self._told.values())
        self._told.clear()
        with self._own_work():
            for model in models:
                self._marks_loaded(model)
            self._treat(models, moment)
        parts = [part for model in models for part in tree.modules(model)]
        _unmark(parts)
        for part in parts:
            self._redrawn.pop(id(part), None)
            self._marked.pop(id(part), None)


def left_alone(module: nn.Module | None) -> Obstacle | None:
    """Why a module's weight is to stay; None if it was drawn in a `Construction` that is not over."""
    marks = [vars(part).get(MARK) for part in tree.modules(module)] if module is not None else []
    if not marks or marks[0] is None or marks[0][0] not in _OPEN:
        return ELSEWHERE
    return next((LEFT[why] for _, why in filter(None, marks) if why), None)


def _is_own(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a descent made it, which trains no network."""
    return type(optimizer).__module__.partition(".")[0] == __name__.partition(".")[0]


def _has_gradient(parameter: nn.Parameter | None) -> bool:
    return parameter is not None and parameter.grad is not None


def _on_meta() -> bool:
    """Whether modules are built without data; asked of no tracer, which would note the question."""
    with _disable_current_modes():
        return torch.empty(0).is_meta


def _unmark(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        vars(module).pop(MARK, None)


def _roots(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Those that are part of no other of these modules and have one of them that is a convolution."""
    built = set(map(id, modules))
    return [
        module
        for module in _outermost(modules)
        if any(id(part) in built and _convolves(part) for part in tree.modules(module))
    ]


def _outermost(modules: Sequence[nn.Module]) -> list[nn.Module]:
    inner = {id(part) for module in modules for part in list(tree.modules(module))[1:]}
    return [module for module in modules if id(module) not in inner]


def _convolves(module: nn.Module) -> bool:
    """Whether it is a convolution, of PyTorch's or of a class of somebody's own, whose parameters have data."""
    if any(map(has_no_data, tree.parameters(module))):
        return False
    return isinstance(module, _ConvNd) or find_call(module) is not None
