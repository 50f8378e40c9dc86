"""The weight that a module's code gives to a convolution, as trial passes show it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from convsim_init.layers import tree
from convsim_init.layers.forward.calls import per_axis
from convsim_init.layers.forward.multiples import probes_like
from convsim_init.layers.forward.trial import Call, NoConvolutionError, convolution_calls, leaves, trial_pass
from convsim_init.layers.weights import StoredWeight, Weight

SIDE = 16  # least extent of an input for another convolution: strides before the own one leave something of it


class TrialWeight(Weight):
    """The weight of the call that counts, among those of convolutions in a module's forward pass.

    Args:
        module: The convolution, or any module that calls one.
        stored: The weight that its attribute holds.
        inner: The convolution whose attribute that is, if it is another module.

    Attributes:
        entry: The convolution whose input determines the shape of the input of trial passes.
    """

    def __init__(self, module: nn.Module, stored: Weight, inner: nn.Module | None = None) -> None:
        super().__init__(*stored.sources)
        self.module, self._stored, self._inner = module, stored, inner or module
        self.shape, self.made_of = stored.shape, frozenset[int]()  # `choose_call` finds what it is made of
        self.entry = self._inner
        self._index = 0  # position of the call that counts, among the candidates
        self._fed = False  # whether only calls count whose input is computed from that of the pass
        self._axes = 0  # number of axes that the input has more than usual

    def choose_call(self) -> None:
        """Choose the call whose weight counts: the first one made of the stored weight, or else the first.

        Calls whose input is computed from that of the pass go before all others, which may only estimate the norm of
        the weight. A note says so if several weights are used.

        Raises:
            NoConvolutionError: If there is none.
            Exception: Whatever the module's own code raises.
        """
        calls, to_the_end = self.calls(self._others())
        self._fed = any(call.fed for call in calls if list(call.weight.shape) == self.shape)
        candidates = self._candidates(calls)
        made_of_stored = [call for call in candidates if self.source_ids & leaves(call.weight)]
        if not candidates or not (made_of_stored or self._inner is self.module):
            raise NoConvolutionError
        self.call = chosen = (made_of_stored or candidates)[0]
        # `candidates.index(chosen)` would compare tuples of tensors, whose truth is an error.
        self._index = [call is chosen for call in candidates].index(True)
        self.made_of = frozenset(leaves(chosen.weight))
        parameters = [p for p in self.module._parameters.values() if p is not None and not is_lazy(p)]
        own = self.source_ids | {id(parameter) for parameter in parameters}

        def uses_otherwise(call: Call) -> bool:
            used = leaves(call.weight)
            if call is chosen or not used & own or not (call.fed or not self._fed or used - self.made_of):
                return False
            alike = (call.groups, call.transposed) == (chosen.groups, chosen.transposed)
            return not (alike and torch.equal(call.weight, chosen.weight))

        several = any(map(uses_otherwise, calls))
        # A pass that ended early may not have come to the others: complex convolutions want a complex input.
        if not to_the_end:
            several |= any(list(p.shape) == self.shape and id(p) not in self.source_ids for p in parameters)
        if several:
            kind = type(self.module).__name__
            self.note = f"one of several weights that {kind} convolves with: the others count for nothing here"

    def is_stored(self) -> bool:
        """Whether the weight that is used is the stored one, whatever its values are; raises like `choose_call`."""
        self.choose_call()
        stored = self._stored.read()
        probes = (*probes_like(stored), stored)
        unchanged = (torch.equal(self._used_for(probe), probe) for probe in probes)
        return isinstance(self._stored, StoredWeight) and all(unchanged)

    def seems_stored(self) -> bool:
        """Like `is_stored`, but by a single pass, with other values of the same size and an input of noise."""
        expected = list[Tensor]()

        def change() -> None:
            for source in (source.detach() for source in self.sources):
                _, signs = probes_like(source)
                # With zeros filled in, or a mask that was applied before would not show.
                source.copy_(torch.where(source == 0, signs, source * signs))
            expected.append(self._stored.read().clone())

        (call,), _ = trial_pass(self.module, self._noise(2), prepare=change)
        if not torch.equal(call.weight, *expected):
            return False
        self.call = call
        return True

    def compute(self, prepare: Callable[[], object] = lambda: None) -> Tensor:
        """The weight that a forward pass gives to the convolution; `prepare` is called right before the pass."""
        return self._call(prepare=prepare).weight

    def calls(self, others: Collection[int]) -> tuple[list[Call], bool]:
        """The result of `convolution_calls`, with an input of more or fewer axes if the code rejects the usual ones."""
        self._axes = 0
        try:
            return convolution_calls(self.module, self._input(), others)
        except Exception:  # whatever the module's own code raises
            for self._axes in (1, -1):  # one more, such as time, before the axis of samples; or no axis of samples
                with suppress(Exception):
                    return convolution_calls(self.module, self._input(), others)
            raise  # the first error, which is about the usual input: others may be about the number of axes alone

    def _used_for(self, probe: Tensor) -> Tensor:
        """The weight that is used if the parameter has these values."""
        return self.compute(partial(self.sources[0].data.copy_, probe))

    def _call(self, x: Tensor | None = None, prepare: Callable[[], object] = lambda: None) -> Call:
        if self.call is None:
            self.choose_call()
        x = self._input() if x is None else x

        def is_there(calls: Sequence[Call]) -> bool:
            return len(self._candidates(calls)) > self._index

        others = self._others()
        calls, _ = trial_pass(self.module, x, others, prepare=prepare, gradient=self._fed, enough=is_there)
        if not is_there(calls):
            raise NoConvolutionError
        return self._candidates(calls)[self._index]

    def _candidates(self, calls: Sequence[Call]) -> list[Call]:
        return [call for call in calls if list(call.weight.shape) == self.shape and (call.fed or not self._fed)]

    def _at_another_input(self) -> Call:
        """The call at an input of noise, with two samples or twice the guessed channels if the code accepts that."""
        try:
            return self._call(self._noise(2))
        except Exception:  # whatever the class's own code raises
            return self._call(self._noise())

    def _noise(self, times: int = 1) -> Tensor:
        x = self._input(times)
        return x + torch.linspace(-1, 2, x.numel(), device=x.device).view_as(x).to(x)

    def _input(self, times: int = 1) -> Tensor:
        """Zeros as an input for `entry`, of so many samples, and as many times the channels if these are a guess."""
        inner, shape = self.entry, self.shape
        if isinstance(inner, _ConvNd):
            steps = zip(per_axis(inner, "dilation"), per_axis(inner, "kernel_size"), strict=True)
            least = 1 if inner is self._inner else SIDE
            if inner.padding_mode != "zeros" and isinstance(inner.padding, tuple):  # an input may not be shorter
                least = max(least, *(padding + 1 for padding in inner.padding))
            size = [times, inner.in_channels, *(max(least, dilation * (taps - 1) + 1) for dilation, taps in steps)]
        else:  # the extents suffice for dilations of up to 4
            channels = getattr(inner, "in_channels", shape[1] * times)
            size = [times, channels, *(4 * (taps - 1) + 1 for taps in shape[2:])]
        size = size[1:] if self._axes < 0 else [*[1] * self._axes, *size]
        return torch.zeros(size, dtype=self.sources[0].dtype, device=self.sources[0].device)

    def _others(self) -> set[int]:
        """Addresses of the parameters of modules inside, except for the weight itself, which one of them may hold."""
        inner = [p for part in parts_of(self.module) for p in tree.parameters(part) if not is_lazy(p)]
        return {parameter.data_ptr() for parameter in inner} - {source.data_ptr() for source in self.sources}


def parts_of(module: nn.Module) -> list[nn.Module]:
    """The children of a module, without its parametrizations."""
    return [child for name, child in tree.named_children(module) if name != "parametrizations"]
