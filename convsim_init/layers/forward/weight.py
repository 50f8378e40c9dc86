"""Convolutions whose forward pass, or a hook before it, uses another weight than their parameter.

Weight standardization (arXiv 1903.10520) and its scaled form (arXiv 2101.08692) do: what the network uses are filters
of zero mean and fixed norm, ``used = slope * (weight - mean(weight))``. Other classes scale their filters, or multiply
them by a mask. No class is known here by its name: a trial pass shows which weight is given to the convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from convsim_init.layers import tree
from convsim_init.layers.forward.isolation import draw_numbers
from convsim_init.layers.forward.multiples import is_multiple, norms_of, probes_like, ratios, slopes_of
from convsim_init.layers.forward.trial import Call, NoConvolutionError, convolution_call, convolution_calls, leaves
from convsim_init.layers.weights import StoredWeight, Weight, describe_mismatch, is_random, to_float64
from convsim_init.report.text import error_text

SIDE = 16  # of an input for another convolution than its own: something is left of it for those that follow


class ForwardWeight(Weight):
    """The weight that a forward pass uses: the stored one, masked, or with its filters centred or scaled.

    Where it is none of these, the stored weight is set to the one wanted, and how far the weight
    that is then used is from it is reported.

    Args:
        module: The convolution, or any module that calls one.
        stored: The weight that its attribute holds.
        inner: The convolution whose attribute that is, where it is another module.

    Attributes:
        entry: The convolution whose input trial passes are made with.
    """

    def __init__(self, module: nn.Module, stored: Weight, inner: nn.Module | None = None) -> None:
        super().__init__(*stored.sources)
        self.module, self._stored, self._inner = module, stored, inner or module
        self.shape, self.made_of = stored.shape, frozenset[int]()  # before `choose_call`
        self.entry = self._inner
        self._index: int | None = None  # of the call that counts, among those with a weight of its shape
        self._fed = False  # whether only those are counted whose input is computed from that of the pass
        self._axes = 0  # how many more the input has than usual
        self._known = True  # whether the weight that is used is the masked, centred or scaled one
        self._mask: Tensor | None = None
        self._centred = False

    @property
    def mask(self) -> Tensor | None:
        """Where the weight that is used may differ from zero, once `obstacle` has looked; None for everywhere."""
        return self._mask

    @torch.no_grad()
    def obstacle(self, *, read_only: bool) -> str | None:
        """Why the stored weight cannot be had, or the one that is used cannot be seen."""
        obstacle = self._stored.obstacle(read_only=read_only) or self._hidden()
        if obstacle is not None:
            self.note = None
        return obstacle

    def _hidden(self) -> str | None:
        kind = type(self.module).__name__
        try:
            used, stored = self.read(), self._stored.read()
            mask = self._find_mask(stored)
            other = self._at_another_input()
            random = is_random(used, self.compute(partial(draw_numbers, stored.device)))
        except Exception as error:  # whatever the class's own code raises
            return f"which weight {kind} uses is not known: a trial pass ended with {error_text(error)}"
        assert self.call is not None
        if other.groups != self.call.groups:
            return f"the groups that {kind} convolves with depend on its input"
        if not used.isfinite().all() and stored.isfinite().all():
            what = f"the weight that {kind} makes of its finite parameter, at an input of zeros,"
            return f"{what} holds infinities or NaN: look for a division by zero in its code"
        if describe_mismatch("class", used, other.weight) and not used.isnan().any():  # it may be rounded anew
            return f"the weight that {kind} uses depends on its input"
        if random:
            return f"the weight that {kind} uses is random, in evaluation mode too"
        if not used.any() and stored.any():
            return f"all weights are zero that {kind} makes of its parameter: its gain is zero"
        self._mask = mask
        # Uncentred first: stored filters of zero mean fit both, and are taken for such.
        for self._centred in (False, True):
            if is_multiple(used, self._variable(stored)):
                return None
        self._mask, self._centred, self._known = self._stored.mask, False, False
        return None

    def choose_call(self) -> Call:
        """Choose the call whose weight counts: the first that depends on parameters, or else the first.

        Calls whose input is not that of the pass do not count beside such as have it: those of an estimate of the
        weight's norm.

        Raises:
            NoConvolutionError: If there is none.
            Exception: Whatever the module's own code raises.
        """
        calls, to_the_end = self.calls(self._others())
        same = [call for call in calls if list(call.weight.shape) == self.shape]
        self._fed = any(call.fed for call in same)
        same = [call for call in same if call.fed or not self._fed]
        made = [call for call in same if self.source_ids & leaves(call.weight)]
        if not same or not (made or self._inner is self.module):
            raise NoConvolutionError
        self.call = chosen = (made or same)[0]
        # Not `same.index(chosen)`, which compares tuples of tensors: these have no single truth.
        self._index, self.made_of = [call is chosen for call in same].index(True), frozenset(leaves(chosen.weight))
        parameters = [one for one in self.module._parameters.values() if one is not None and not is_lazy(one)]
        own = self.source_ids | {id(one) for one in parameters}
        several = any(
            (used := leaves(call.weight)) & own
            and (call.fed or not self._fed or used - self.made_of)
            and call is not chosen
            and not _same_convolution(call, chosen)
            for call in calls
        )
        if not to_the_end:  # perhaps it would have come to them: complex convolutions want a complex input
            several |= any(list(one.shape) == self.shape and id(one) not in self.source_ids for one in parameters)
        if several:
            kind = type(self.module).__name__
            self.note = f"one of several weights that {kind} convolves with: the others count for nothing here"
        return chosen

    def is_stored(self) -> bool:
        """Whether the weight that is used is the stored one, whatever its values are; it raises as `choose_call`."""
        self.choose_call()
        stored = self._stored.read()
        probes = (*probes_like(stored), stored)
        return isinstance(self._stored, StoredWeight) and all(torch.equal(self._given_of(one), one) for one in probes)

    def compute(self, prepare: Callable[[], object] = lambda: None) -> Tensor:
        """The weight that a forward pass gives to the convolution, after what is done right before it."""
        return self._call(prepare=prepare).weight

    @torch.no_grad()
    def write(self, weight: Tensor) -> str | None:
        """Choose the stored weight so that its class computes this one, centred if the class centres filters."""
        used, stored = self.read(), self._stored.read()
        if not self._known or torch.equal(used, stored):
            return self._write_nearest(weight, used, stored)
        variable, target = self._variable(stored), self._variable(weight)
        slopes = slopes_of(used, variable)  # [M, 1, ...]
        # Masks and centring take from a filter's norm, which is to be that of the one wanted.
        target *= ratios(norms_of(weight), norms_of(target))
        # What a mask hides is no part of the variable and stays, to the bit.
        changed = to_float64(stored) - variable + ratios(target, slopes)
        self._stored.write(torch.where(slopes == 0, stored, changed).to(weight))
        return describe_mismatch("class", target, self.read())

    def _write_nearest(self, weight: Tensor, used: Tensor, stored: Tensor) -> str | None:
        """Store the weight or, where something is added to what is stored, the rest of it: whichever comes nearer."""
        summand = (to_float64(stored) + to_float64(weight) - to_float64(used)).to(stored)

        def distance(candidate: Tensor) -> float:
            self._stored.write(candidate)
            return float(torch.linalg.vector_norm(to_float64(self.read()) - to_float64(weight)))

        # Not `<=`, which is false of NaN: then it is the weight itself that is stored.
        if torch.equal(used, stored) or not distance(weight) > distance(summand):  # that which is last stays
            self._stored.write(weight)
        return describe_mismatch("class", weight, self.read())

    def storage(self) -> dict[str, Tensor]:
        """The tensors that the stored weight is stored in."""
        return self._stored.storage()

    def calls(self, others: Collection[int]) -> tuple[list[Call], bool]:
        """As of `convolution_calls`, at an input of more or fewer axes where its code rejects the usual ones."""
        errors = []
        try:
            for self._axes in (0, 1, -1):  # one more such as that of time, before that of samples; or none of samples
                try:
                    return convolution_calls(self.module, self._input(), others)
                except Exception as error:  # whatever the module's own code raises
                    errors.append(error)
            # The first is that at the usual input; the others may only be of the wrong number of axes.
            raise errors[0]
        finally:
            errors.clear()  # whose tracebacks hold this frame, and so the module

    def _given_of(self, probe: Tensor) -> Tensor:
        """What is given where those are the values of the parameter."""
        return self.compute(partial(self.sources[0].data.copy_, probe))

    def _call(self, x: Tensor | None = None, prepare: Callable[[], object] = lambda: None) -> Call:
        if self._index is None:
            self.choose_call()
        x = self._input() if x is None else x
        others, index = self._others(), self._index or 0
        return convolution_call(self.module, self.shape, x, others, index=index, fed=self._fed, prepare=prepare)

    def _at_another_input(self) -> Call:
        """The call at an input of noise: of two samples and, if channels are a guess, of twice as many, if it can."""
        try:
            return self._call(self._noise(2))
        except Exception:  # whatever the class's own code raises
            return self._call(self._noise())

    def _noise(self, times: int = 1) -> Tensor:
        x = self._input(times)
        return x + torch.linspace(-1, 2, x.numel(), device=x.device).view_as(x).to(x)

    def _input(self, times: int = 1) -> Tensor:
        """Zeros that the convolution takes, so many samples."""
        inner, shape = self.entry, self.shape
        if isinstance(inner, _ConvNd):
            steps = zip(inner.dilation, inner.kernel_size, strict=True)
            least = 1 if inner is self._inner else SIDE
            if inner.padding_mode != "zeros" and isinstance(inner.padding, tuple):  # of which there must be enough
                least = max(least, *(padding + 1 for padding in inner.padding))
            size = [times, inner.in_channels, *(max(least, dilation * (taps - 1) + 1) for dilation, taps in steps)]
        else:  # enough for usual dilations
            channels = getattr(inner, "in_channels", shape[1] * times)
            size = [times, channels, *(4 * (taps - 1) + 1 for taps in shape[2:])]
        size = size[1:] if self._axes < 0 else [*[1] * self._axes, *size]
        return torch.zeros(size, dtype=self.sources[0].dtype, device=self.sources[0].device)

    def _others(self) -> set[int]:
        """Addresses of the parameters of other modules inside it."""
        inner = [one for part in parts_of(self.module) for one in tree.parameters(part) if not is_lazy(one)]
        # A module inside may hold the weight itself, which counts all the same.
        return {one.data_ptr() for one in inner} - {source.data_ptr() for source in self.sources}

    def _find_mask(self, stored: Tensor) -> Tensor | None:
        """Where zeros are imposed on any weight, by what becomes of one without zeros; None if nowhere."""
        if self._stored.mask is not None or not isinstance(self._stored, StoredWeight):
            return self._stored.mask
        _, probe = probes_like(stored)
        used, opposite = self._given_of(probe), self._given_of(-probe)
        mask = used != 0
        if mask.all() or not torch.equal(opposite != 0, mask):  # it depends on the weight, as a ReLU of it does
            return None
        return mask if is_multiple(used, to_float64(probe * mask)) else None

    def _variable(self, weight: Tensor) -> Tensor:
        """What of a weight ``[M, ...]`` its class makes use of, in the widest dtype."""
        weight = to_float64(weight) * (1 if self._mask is None else self._mask)
        return weight - weight.mean(tuple(range(1, weight.dim())), keepdim=True) if self._centred else weight


def _same_convolution(a: Call, b: Call) -> bool:
    return (a.groups, a.transposed) == (b.groups, b.transposed) and torch.equal(a.weight, b.weight)


def parts_of(module: nn.Module) -> list[nn.Module]:
    """The modules that one holds, but for its parametrizations."""
    return [child for name, child in tree.named_children(module) if name != "parametrizations"]
