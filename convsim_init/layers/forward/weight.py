"""Convolutions whose forward pass, or a hook before it, uses another weight than their parameter.

Weight standardization (arXiv 1903.10520) and its scaled form (arXiv 2101.08692) do so: the network uses filters of zero
mean and fixed norm, ``used = slope * (weight - mean(weight))``. Other classes scale their filters, or multiply them by
a mask. No class is recognized by its name: trial passes show which weight is given to the convolution.
"""

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
from convsim_init.layers.forward.isolation import draw_numbers, isolated
from convsim_init.layers.forward.multiples import is_multiple, norms_of, probes_like, ratios, slopes_of
from convsim_init.layers.forward.trial import Call, NoConvolutionError, convolution_calls, leaves, trial_pass
from convsim_init.layers.memory import gradient_hooks
from convsim_init.layers.obstacle import Obstacle
from convsim_init.layers.weights import StoredWeight, Weight, describe_mismatch, is_random, to_float64
from convsim_init.report.text import error_text

SIDE = 16  # least extent of an input for another convolution: strides before the own one leave something of it


class ForwardWeight(Weight):
    """The weight that a forward pass uses, where the module's code makes it of the stored one.

    `obstacle` has to be called first. By trial passes with several weights and inputs it fits this model, with a slope
    for each filter, where the mean is that of each filter and only subtracted if the class centres filters::

        used = slopes * variable, variable = stored * mask - mean

    `write` inverts the model. If it does not fit, `write` stores the new weight, that minus ``used - stored`` or, where
    that is exact, that with its entries moved, and reports how far the weight that is then used differs from it.

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
        self._known = True  # whether the model above fits
        self._mask: Tensor | None = None
        self._centred = False

    @property
    def mask(self) -> Tensor | None:
        """Where the weight that is used may differ from zero; None for everywhere, and before `obstacle` is called."""
        return self._mask

    @torch.no_grad()
    def obstacle(self, *, read_only: bool) -> Obstacle | None:
        """Why the stored weight cannot be treated, or why it is unclear which weight is used; None if all is well."""
        obstacle = self._stored.obstacle(read_only=read_only) or self._find_model()
        if obstacle is not None:
            self.note = None
        return obstacle

    def _find_model(self) -> Obstacle | None:
        """Find the mask and whether filters are centred; the reason if it remains unclear which weight is used."""
        kind = type(self.module).__name__
        try:
            used, stored = self.read(), self._stored.read()
            mask = self._find_mask(stored)
            other = self._at_another_input()
            random = is_random(used, self.compute(partial(draw_numbers, stored.device)))
        except Exception as error:  # whatever the class's own code raises
            return Obstacle(f"which weight {kind} uses is not known: a trial pass ended with {error_text(error)}")
        assert self.call is not None
        if other.groups != self.call.groups:
            return Obstacle(f"the groups that {kind} convolves with depend on its input")
        if not used.isfinite().all() and stored.isfinite().all():
            what = f"the weight that {kind} makes of its finite parameter, at an input of zeros,"
            return Obstacle(f"{what} holds infinities or NaN: look for a division by zero in its code")
        # Up to rounding, which may differ with the input.
        if describe_mismatch("class", used, other.weight) and not used.isnan().any():
            return Obstacle(f"the weight that {kind} uses depends on its input")
        if random:
            return Obstacle(f"the weight that {kind} uses is random, in evaluation mode too")
        if not used.any() and stored.any():
            return Obstacle(f"all weights are zero that {kind} makes of its parameter: its gain is zero")
        self._mask = mask
        # Stored filters of zero mean fit both, and count as not centred by the class.
        for self._centred in (False, True):
            if is_multiple(used, self._variable(stored)):
                return None
        self._mask, self._centred, self._known = self._stored.mask, False, False
        return None

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

    @torch.no_grad()
    def write(self, weight: Tensor) -> str | None:
        """Set the stored weight so that the class computes this one, centred if the class centres filters."""
        used, stored = self.read(), self._stored.read()
        if not self._known or torch.equal(used, stored):
            return self._write_nearest(weight, used, stored)
        variable, target = self._variable(stored), self._variable(weight)
        slopes = slopes_of(used, variable)  # [M, 1, ...]
        # The mask and the centring lower the norm of a filter, which is to be that of the given one.
        target *= ratios(norms_of(weight), norms_of(target))
        # Entries that the mask hides are no part of the variable, and keep their values to the bit.
        changed = to_float64(stored) - variable + ratios(target, slopes)
        self._stored.write(torch.where(slopes == 0, stored, changed).to(weight))
        return describe_mismatch("class", target, self.read())

    def _write_nearest(self, weight: Tensor, used: Tensor, stored: Tensor) -> str | None:
        """Store what gives this weight or, if none does, what comes nearest: it, or it minus what the class adds."""
        # A clone, because the weight that was read may share the memory that is written to.
        change, candidates, stored = to_float64(weight) - to_float64(used), [weight], stored.clone()
        if not torch.equal(used, stored):
            candidates.append((to_float64(stored) + change).to(stored))

        def distance(candidate: Tensor) -> float:
            self._stored.write(candidate)
            return float(torch.linalg.vector_norm(to_float64(self.read()) - to_float64(weight)))

        def mismatch(candidate: Tensor) -> str | None:
            self._stored.write(candidate)
            return describe_mismatch("class", weight, self.read())

        # For NaN `min` returns the first of them. Each write lets a spectral norm's vectors converge further.
        nearest = min(candidates, key=distance) if candidates[1:] else weight
        difference = mismatch(nearest)
        if difference is not None and isinstance(self._stored, StoredWeight):
            if any(mismatch(moved) is None for moved in self._moved_back(stored, change)):
                return None
            self._stored.write(nearest)
        return difference

    def _moved_back(self, stored: Tensor, change: Tensor) -> list[Tensor]:
        """The stored weight that changes the used one by this, if a class moves entries, as by a flip, and scales all.

        Such a class computes ``used = c P stored`` with a permutation P, whose inverse is its transpose. By derivatives
        ``back = c P' change``, so that the stored weight changes by ``back / c²``, where c is the ratio of the norms.
        """
        source = self.sources[0]
        try:
            # Code that computes derivatives, and hooks on gradients, may change the module, too.
            with isolated(self.module), torch.enable_grad():
                for hooks in gradient_hooks(source):
                    hooks.clear()
                used = self.compute()
                (back,) = torch.autograd.grad(used, source, change.to(used))
            return [(to_float64(stored) + to_float64(back) * (change.norm() / back.norm()).square()).to(stored)]
        except (Exception, SystemExit):  # of any kind, from a class that is not differentiable
            return []

    def storage(self) -> dict[str, Tensor]:
        """The tensors that the stored weight is stored in."""
        return self._stored.storage()

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

    def _find_mask(self, stored: Tensor) -> Tensor | None:
        """Where the class sets any weight to zero, as it does to one without zeros; None if nowhere."""
        if self._stored.mask is not None or not isinstance(self._stored, StoredWeight):
            return self._stored.mask
        _, probe = probes_like(stored)
        used, opposite = self._used_for(probe), self._used_for(-probe)
        mask = used != 0
        if mask.all() or not torch.equal(opposite != 0, mask):  # then the zeros depend on the weight, as by a ReLU
            return None
        return mask if is_multiple(used, to_float64(probe * mask)) else None

    def _variable(self, weight: Tensor) -> Tensor:
        """The part of a weight ``[M, ...]`` that the class uses: masked, and centred if it centres filters."""
        weight = to_float64(weight) * (1 if self._mask is None else self._mask)
        return weight - weight.mean(tuple(range(1, weight.dim())), keepdim=True) if self._centred else weight


def parts_of(module: nn.Module) -> list[nn.Module]:
    """The children of a module, without its parametrizations."""
    return [child for name, child in tree.named_children(module) if name != "parametrizations"]
