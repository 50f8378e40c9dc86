"""The time before the first forward pass of models, in which their weights may still be drawn anew."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from convsim_init.layers import tree
from convsim_init.layers.forward.isolation import is_running
from convsim_init.tracking.patching import ignore, observed


@contextmanager
def before_first_pass(models: Sequence[nn.Module], act: Callable[[], None]) -> Iterator[None]:
    """Context in which a function is called before a forward pass of a part of some models, or before one is compiled.

    Passes that are traced or transformed, and trial passes of this package, do not count. The function must end the
    context at its first call.
    """
    named_parts = [named for model in models for named in tree.named_modules(model)]
    # Without parametrizations, which run whenever their weight is read.
    parts = {id(part): part for name, part in named_parts if "parametrizations" not in name.split(".")}

    def before_call(module: nn.Module, _: object) -> None:
        tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        transformed = torch._C._functorch.peek_interpreter_stack() is not None  # by torch.func
        if tracing or transformed or torch.compiler.is_compiling():
            return
        if not is_running(in_any_thread=True) and any(id(part) in parts for part in tree.modules(module)):
            act()

    def before_compiling(model: object = None, **_: object) -> None:
        for module in _modules_of(model):
            before_call(module, None)

    with ExitStack() as stack:
        compiled = {id(module) for part in _compiled(part for _, part in named_parts) for module in tree.modules(part)}
        if not compiled:
            stack.callback(register_module_forward_pre_hook(before_call).remove)
        else:  # a compiled module would warn of a global hook, and be compiled anew once that is removed
            for key in parts.keys() - compiled:
                stack.callback(parts[key].register_forward_pre_hook(_Hook(before_call)).remove)
        stack.enter_context(observed(torch, "compile", before=before_compiling))
        yield


def drop_hooks(module: nn.Module) -> None:
    """Remove from a copy the hooks that `before_first_pass` put on the original."""
    for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _Hook)]:
        del module._forward_pre_hooks[key]


def _modules_of(target: object) -> list[nn.Module]:
    """The modules that torch.compile compiles with a target: the target itself, its owner, or those it refers to."""
    owner = getattr(target, "__self__", target)
    if isinstance(owner, nn.Module):
        return [owner]
    found = list(vars(owner).values()) if hasattr(owner, "__dict__") else []
    with suppress(TypeError, ValueError):  # raised for what is no Python function
        variables = inspect.getclosurevars(target)  # type: ignore[arg-type]
        found += [*variables.nonlocals.values(), *variables.globals.values()]
    return [value for value in found if isinstance(value, nn.Module)]


class _Hook:
    """Hook of a single module; a copy of it does nothing."""

    def __init__(self, act: Callable[[nn.Module, object], None]) -> None:
        self._act = act

    def __call__(self, module: nn.Module, inputs: object) -> None:
        self._act(module, inputs)

    def __reduce__(self) -> tuple[object, ...]:
        return _Hook, (ignore,)


def _compiled(parts: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Those of some modules that torch.compile has compiled, in place or within a wrapper."""
    for part in parts:
        if part._compiled_call_impl is not None:
            yield part
        elif "_orig_mod" in part._modules:
            yield part.get_submodule("_orig_mod")
