"""What convolutions give in a forward pass, before what their own classes make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from convsim_init.layers.forward.calls import CONVOLUTIONS, convolution_arguments, has_forward_of_its_own

Change = Callable[[str, Tensor, Tensor | None], Tensor | None]


@contextmanager
def convolution_outputs(modules: Sequence[tuple[str, _ConvNd]], change: Change) -> Iterator[None]:
    """Context in which a function is called with each output of convolutions, and may return another one.

    Where a class calls a convolution and then normalizes or activates what comes out, or adds its bias, it is what
    comes out; where no call is seen, it is what the module returns.

    Args:
        modules: Convolutions, with their names.
        change: What is called with the name, the output and the bias that is in it. None leaves the output as it is.
    """
    own = {module for _, module in modules if has_forward_of_its_own(module)}
    calls = _Calls(change, {id(module): _shape(module) for module in own})
    with ExitStack() as stack:
        for name, module in modules:
            if module in own:
                stack.callback(module.register_forward_pre_hook(partial(calls.enter, name)).remove)
                stack.callback(module.register_forward_hook(calls.leave, always_call=True).remove)
            else:
                stack.callback(module.register_forward_hook(partial(_hook, change, name)).remove)
        if own:
            stack.enter_context(calls)
        yield


def _shape(module: _ConvNd) -> torch.Size | None:
    weight = module._parameters.get("weight")  # what is computed is not computed for this
    return None if weight is None else weight.shape


def _hook(change: Change, name: str, module: _ConvNd, inputs: object, output: object) -> Tensor | None:
    return change(name, output, getattr(module, "bias", None)) if isinstance(output, Tensor) else None


class _Calls(TorchFunctionMode):
    """Context in which the convolutions that some modules call are seen."""

    def __init__(self, change: Change, shapes: Mapping[int, torch.Size | None]) -> None:
        super().__init__()
        self._change, self._shapes = change, shapes
        self._running: list[tuple[str, _ConvNd]] = []
        self._seen: list[bool] = []  # whether those that run have called a convolution

    def enter(self, name: str, module: _ConvNd, inputs: object) -> None:
        """Hook before the forward pass of such a module."""
        self._running.append((name, module))
        self._seen.append(False)

    def leave(self, module: _ConvNd, inputs: object, output: object) -> Tensor | None:
        """Hook after it."""
        name, _ = self._running.pop()
        return None if self._seen.pop() else _hook(self._change, name, module, inputs, output)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func not in CONVOLUTIONS or not self._running:
            return output
        name, module = self._running[-1]
        _, weight, bias, *_ = convolution_arguments(func, args, kwargs)
        others = (*vars(module).values(), *(one for key, one in module._buffers.items() if key != "weight"))
        if self._shapes[id(module)] not in (None, weight.shape) or any(weight is one for one in others):
            return output  # such as one that counts what a mask covers
        self._seen[-1] = True
        changed = self._change(name, output, bias)
        return output if changed is None else changed
