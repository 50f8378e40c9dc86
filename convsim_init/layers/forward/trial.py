"""Trial passes: a module's forward pass runs as far as needed, and its calls of convolutions are recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from convsim_init.layers import tree
from convsim_init.layers.forward.calls import CONVOLUTIONS, Convolution, convolution_arguments
from convsim_init.layers.forward.copies import ORIGINAL
from convsim_init.layers.forward.isolation import isolated


class NoConvolutionError(RuntimeError):
    """The forward pass called no convolution with a weight of the module's shape."""

    def __init__(self) -> None:
        super().__init__("its forward pass, in evaluation mode, called no convolution with a weight of that shape")


class Call(NamedTuple):
    """A call of a convolution in a forward pass."""

    weight: Tensor  # a copy, made at the call
    groups: int
    transposed: bool
    strides: int  # product of the strides
    fed: bool  # whether its input is computed from that of the pass, as far as derivatives show


def convolution_calls(module: nn.Module, x: Tensor, others: Collection[int] = ()) -> tuple[list[Call], bool]:
    """All calls of convolutions in a module's forward pass on x, but for those with weights at the addresses `others`.

    The weights are differentiable by the parameters that they are made of, frozen ones too. Also returned is whether
    the pass came to its end. An error of the module's code is raised only if it comes before the first call.
    """

    def train_all() -> None:
        for parameter in tree.parameters(module):
            # PyTorch lets no other parameter require a gradient.
            if parameter.is_floating_point() and not parameter.is_inference():
                parameter.requires_grad_()

    calls, to_the_end = list[Call](), False
    with suppress(Exception):  # such as that of code which refuses an input with a gradient
        calls, to_the_end = trial_pass(module, x, others, prepare=train_all, gradient=True)
    if to_the_end:
        return calls, to_the_end
    without = trial_pass(module, x, others, prepare=train_all)
    return without if len(without[0]) > len(calls) else (calls, to_the_end)


def trial_pass(
    module: nn.Module,
    x: Tensor,
    others: Collection[int] = (),
    *,
    prepare: Callable[[], object] = lambda: None,
    gradient: bool = False,
    enough: Callable[[Sequence[Call]], bool] = lambda _: False,
) -> tuple[list[Call], bool]:
    """All calls of convolutions in a module's forward pass on x, in evaluation mode; see `convolution_calls`.

    The weights are differentiable by the module's parameters, also in inference mode unless it was made in that mode.
    What `prepare` changes of the module, right before the pass, is undone after it. An input that requires a `gradient`
    shows which calls are fed from it; code might refuse it. The pass ends once the calls so far are `enough`, for what
    follows may take long.
    """
    tensors = (*tree.parameters(module), *tree.buffers(module))
    differentiable = not any(tensor.is_inference() for tensor in tensors)
    with torch.inference_mode(False) if differentiable else nullcontext():
        leaf = x.detach().clone().requires_grad_(gradient and differentiable and x.is_floating_point())
        capture = _Capture(leaf, others, enough)
        with isolated(module), capture, torch.enable_grad():
            prepare()
            try:
                module(leaf.clone())  # a clone, because PyTorch refuses to change a leaf with a gradient in place
            except _EnoughError:
                return capture.calls, False
            except (Exception, SystemExit) as error:
                if capture.calls:
                    return capture.calls, False
                if isinstance(error, SystemExit):  # code may end the program at an input that it does not expect
                    raise RuntimeError("its own code ended the program") from error
                raise
        return capture.calls, True


def leaves(tensor: Tensor) -> set[int]:
    """The ids of the leaves that a tensor is computed from; for copies that a trial made, the ids of the originals."""
    variables = [node.variable for node in _behind(tensor.grad_fn) if hasattr(node, "variable")]
    return {getattr(variable, ORIGINAL, id(variable)) for variable in variables}


def _behind(start: Any, known: Collection[Any] = ()) -> Iterator[Any]:
    """A node of the autograd graph and all nodes that it leads to; known nodes are not followed further."""
    found, pending = {start}, [start]
    for node in pending:  # grows in the loop
        yield node
        following = () if node in known else getattr(node, "next_functions", ())
        new = {following_node for following_node, _ in following} - found
        found |= new
        pending += new


def is_parameter(weight: Tensor) -> bool:
    """Whether the weight of a call is an unchanged parameter."""
    # The weight of a call is a clone, and its original is one step back.
    ((before, _),) = weight.grad_fn.next_functions if weight.grad_fn else ((None, 0),)
    parameter = getattr(before, "variable", None)
    return parameter is not None and torch.equal(parameter, weight)


class _EnoughError(BaseException):
    """Ends a forward pass whose calls are enough; no handler of an `Exception` stops it."""


class _Capture(TorchFunctionMode):
    """Context that records the calls of convolutions, except those with weights at the addresses `others`."""

    def __init__(self, leaf: Tensor, others: Collection[int], enough: Callable[[Sequence[Call]], bool]) -> None:
        super().__init__()
        self._leaf, self._others = leaf, others  # the input of the pass is a clone of the leaf
        self._enough = enough
        self.calls: list[Call] = []
        self._known: dict[Any, bool] = {None: False}  # whether a node of the autograd graph leads to the leaf

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func in CONVOLUTIONS:
            self._note(convolution_arguments(func, args, kwargs))
            if self._enough(self.calls):
                raise _EnoughError
        return func(*args, **kwargs)

    def _is_fed(self, start: Any) -> bool:
        """Whether a node of the autograd graph leads to the leaf; known nodes are not searched again."""
        found = list[Any]()
        for node in _behind(start, self._known):
            if self._known.get(node) or getattr(node, "variable", None) is self._leaf:
                self._known[start] = True
                return True
            found.append(node)
        # No node that was found leads there.
        self._known |= dict.fromkeys(found, False)
        return False

    def _note(self, given: Convolution) -> None:
        weight, strides = given.weight, given.strides
        if isinstance(weight, tuple):  # a quantized weight, with its scale and more
            weight = next((part for part in weight if isinstance(part, Tensor)), torch.empty(()))
        if weight.data_ptr() not in self._others:
            fed = isinstance(given.x, Tensor) and self._is_fed(given.x.grad_fn)
            # A single stride counts along each axis of the kernel.
            steps = math.prod(strides) ** (1 if len(strides) > 1 else weight.dim() - 2)
            copy = weight.clone()  # its memory will be restored after the pass
            self.calls.append(Call(copy, given.groups, given.transposed, steps, fed))
